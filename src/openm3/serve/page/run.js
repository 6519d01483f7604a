// One answer under way: its stream is read into its message, and the message is saved as it grows.

import { apiMessages, streamChat } from "./api.js";

const SAVE_EVERY = 300; // ms

/** A message for an answer that has yet to come. state: "streaming" | "done" | "stopped" | "failed". */
export function newAnswer(chat, seq) {
  return { chat: chat.id, seq, role: "assistant", text: "", thinking: "", calls: [], state: "streaming" };
}

/** The request for an answer, but for its messages. */
function options({ mode, settings }, model) {
  const { tools, temperature, maxTokens } = settings;
  const body = { model, thinking: { type: mode } };
  if (tools) body.tools = JSON.parse(tools);
  if (temperature !== undefined) body.temperature = temperature;
  if (maxTokens !== undefined) body.max_tokens = maxTokens;
  return body;
}

export class Run {
  /** thread: the messages to answer and, last, the answer. model: an async function that names the model to ask.
   * changed: called when the answer has; unsaved: with the error when it cannot be saved. */
  constructor({ chat, thread, model, key, store, shelf, changed, unsaved }) {
    Object.assign(this, { chat, thread, model, key, store, shelf, changed, unsaved });
    this.message = thread.at(-1);
    this.abort = new AbortController();
    this.started = performance.now();
    this.came = 0; // pieces of the answer
  }

  stop() {
    this.abort.abort();
  }

  /** Resolves when the answer has ended, however it did; the message says how. */
  async finished() {
    const { message, chat } = this;
    await this.save();
    const timer = setInterval(() => this.dirty && this.save(), SAVE_EVERY);
    try {
      const before = this.thread.slice(0, -1);
      const messages = await apiMessages(before, chat.settings.instructions, (item) => this.shelf.dataUrl(item));
      const body = { ...options(chat, await this.model()), messages };
      for await (const chunk of streamChat(body, { key: this.key, signal: this.abort.signal })) {
        this.take(chunk);
        this.dirty = true;
        this.changed();
      }
      message.state = "done";
    } catch (error) {
      this.endBadly(error);
    }
    clearInterval(timer);
    message.ms = performance.now() - this.started;
    this.thoughtEnds();
    await this.save();
  }

  endBadly(error) {
    const { message } = this;
    message.state = error.name === "AbortError" ? "stopped" : "failed";
    if (message.state === "stopped") return;
    message.error = error.message;
    message.status = error.status;
  }

  async save() {
    this.dirty = false;
    await this.store.saveMessage(this.message).catch(this.unsaved);
  }

  take({ choices, usage, model }) {
    const { message } = this;
    if (usage) message.usage = usage;
    if (model) message.model = model;
    const choice = choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) message.finish = choice.finish_reason;
    const { content, reasoning_content: thinking, tool_calls: calls } = choice.delta ?? {};
    if (content || thinking || calls?.length) this.came++;
    if (thinking) {
      this.thinkingSince ??= performance.now();
      message.thinking += thinking;
    }
    if (content) {
      this.thoughtEnds();
      message.text += content;
    }
    for (const call of calls ?? []) this.takeCall(call);
  }

  takeCall({ index, id, function: given }) {
    this.thoughtEnds();
    const { calls } = this.message;
    const at = index ?? calls.length;
    calls[at] ??= { id: id ?? `call_${at}`, name: "", arguments: "" };
    calls[at].name += given?.name ?? "";
    calls[at].arguments += given?.arguments ?? "";
  }

  thoughtEnds() {
    if (this.thinkingSince !== undefined) this.message.thoughtMs ??= performance.now() - this.thinkingSince;
  }
}
