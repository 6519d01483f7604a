// How one message looks: a question with its pictures, or an answer with its thinking, text and tool calls.
//
// A view is made once and updated as its message grows, so that an unfolded thought or a half-written result stays.

import { announce, copy, h, icon, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";
import { thumbnail } from "./media.js";

/** A question. actions: {edit}; context: {shelf}. */
export class QuestionView {
  constructor(message, { shelf, actions }) {
    this.message = message;
    const { media, text } = message;
    this.editButton = iconButton("pencil", "Edit this question", () => actions.edit(message));
    this.element = h("article", { class: "message question", "aria-label": "Your question" },
      media.length > 0 && h("div", { class: "thumbnails" }, media.map((item) => thumbnail(item, shelf))),
      h("div", { class: "line" },
        text && h("div", { class: "bubble" }, text),
        h("div", { class: "actions" }, this.editButton, text && copyButton("Copy this question", () => text))));
  }

  update({ last }) {
    this.editButton.hidden = !last;
  }
}

/** An answer. actions: {retry, answerCalls, settings}. */
export class AnswerView {
  constructor(message, { actions }) {
    this.message = message;
    this.actions = actions;
    this.calls = [];
    this.summary = h("span", { class: "label" });
    this.thought = h("div", { class: "thought" });
    this.thinking = h("details", { class: "thinking", hidden: true },
      h("summary", {}, icon("chevron"), this.summary), this.thought);
    this.text = h("div", { class: "text" });
    this.markdown = new Markdown(this.text);
    this.waiting = h("div", { class: "waiting", hidden: true }, h("i"), h("i"), h("i"));
    this.callList = h("div", { class: "calls" });
    this.note = h("div", { class: "note", hidden: true });
    this.usage = h("span", { class: "usage" });
    this.copyButton = copyButton("Copy this answer", () => message.text);
    this.retryButton = iconButton("retry", "Answer again", () => actions.retry());
    this.footer = h("div", { class: "actions" }, this.copyButton, this.retryButton, this.usage);
    this.element = h("article", { class: "message answer", "aria-label": "Answer" },
      this.thinking, this.text, this.callList, this.waiting, this.note, this.footer);
  }

  /** place: {last, running, elsewhere, results: {call id: text}}. */
  update(place) {
    const message = this.message;
    this.showThinking(place.running);
    if (message.text !== this.shownText) this.markdown.show(message.text);
    this.shownText = message.text;
    this.waiting.hidden = !(place.running && !message.text && !message.thinking && !message.calls.length);
    this.text.classList.toggle("growing", Boolean(place.running && message.text && !message.calls.length));
    this.showCalls(place);
    this.showNote(place);
    this.footer.hidden = Boolean(place.running);
    this.copyButton.hidden = !message.text;
    this.retryButton.hidden = !place.last || Boolean(this.note.querySelector("button")); // one way to try again
    this.usage.replaceChildren(...usageParts(message));
  }

  showThinking(running) {
    const { thinking, thoughtMs, text, calls } = this.message;
    this.thinking.hidden = !thinking.trim();
    const underWay = running && !text && !calls.length;
    this.thinking.classList.toggle("active", Boolean(underWay));
    const thought = thoughtMs === undefined ? "Thought" : `Thought for ${seconds(thoughtMs)}`;
    this.summary.textContent = underWay ? "Thinking…" : thought;
    if (thinking !== this.shownThinking) this.thought.textContent = thinking.trim();
    this.shownThinking = thinking;
  }

  showCalls({ last, running, results }) {
    const { calls, state } = this.message;
    calls.forEach((call, i) => {
      this.calls[i] ??= new CallView(call, this.callList);
      this.calls[i].update(results[call.id], last && !running && state === "done");
    });
    const open = this.calls.filter((view) => view.open);
    if (!open.length) return this.form?.remove();
    if (this.form?.isConnected) return;
    this.form = h("form", { class: "results" },
      h("span", {}, open.length > 1 ? "The model waits for these results." : "The model waits for this result."),
      h("button", { type: "submit", class: "primary" }, open.length > 1 ? "Send results" : "Send result"));
    this.callList.append(this.form);
    this.callList.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    };
    this.form.onsubmit = (event) => {
      event.preventDefault();
      const empty = open.find((view) => !view.result.value.trim());
      if (empty) return empty.result.focus();
      if (this.sent) return;
      this.sent = true; // a second Enter sends nothing twice
      this.actions.answerCalls(open.map((view) => ({ call: view.call.id, text: view.result.value.trim() })));
    };
  }

  showNote({ running, elsewhere, last }) {
    const { message } = this;
    const { state, error, status, finish } = message;
    let text = null;
    if (elsewhere) text = "This is being answered in another tab.";
    else if (state === "failed") text = error;
    else if (state === "stopped") text = "Stopped.";
    else if (state === "streaming" && !running) text = "This answer was interrupted when the page closed.";
    else if (finish === "length") text = "Cut off: the longest answer allowed is reached.";
    else if (state === "done" && !message.text && !message.calls.length) text = "The model gave no answer.";
    const failed = state === "failed" && !elsewhere;
    if (this.shownNote === `${text} ${last}`) return;
    this.shownNote = `${text} ${last}`;
    this.note.hidden = !text;
    this.note.classList.toggle("failed", failed);
    if (failed) this.note.setAttribute("role", "alert");
    else this.note.removeAttribute("role");
    const button = (label, run) => h("button", { type: "button", class: "link", onclick: run }, label);
    this.note.replaceChildren(failed ? icon("missing") : "", h("p", {}, text ?? "",
      failed && status === 401 && button("Enter a key", this.actions.settings),
      text && last && !elsewhere && finish !== "length" && button("Try again", this.actions.retry)));
  }
}

/** One tool call: its name, its arguments, and its result or a field for it. */
class CallView {
  constructor(call, parent) {
    this.call = call;
    this.title = h("span", { class: "name" });
    this.body = h("dl", {});
    this.result = null;
    this.open = false;
    const header = h("header", {}, icon("tool"), this.title);
    this.element = h("section", { class: "call", "aria-label": "Tool call" }, header, this.body);
    parent.append(this.element);
  }

  update(result, waits) {
    const { name, arguments: json } = this.call;
    this.title.textContent = name || "…";
    if (json !== this.shown) this.body.replaceChildren(...argumentRows(json));
    this.shown = json;
    this.open = Boolean(waits && result === undefined);
    if (result !== undefined && this.outcome !== result) {
      this.outcome = result;
      this.field?.remove();
      this.element.append(h("div", { class: "outcome" }, h("span", {}, "Result"), h("pre", {}, pretty(result))));
    }
    if (this.open && !this.field) {
      this.result = h("textarea", { rows: "1", placeholder: "Text or JSON", spellcheck: "false" });
      this.field = h("label", { class: "outcome" }, h("span", {}, "Result"), this.result);
      this.element.append(this.field);
    }
    if (this.field) this.field.hidden = !this.open;
  }
}

function argumentRows(json) {
  let value;
  try {
    value = JSON.parse(json || "{}");
  } catch {
    return [h("dt", {}, "…"), h("dd", {}, json)];
  }
  if (typeof value !== "object" || value === null) return [h("dt", {}, "…"), h("dd", {}, json)];
  return Object.entries(value).flatMap(([name, item]) => [
    h("dt", {}, name),
    h("dd", {}, typeof item === "string" ? item : JSON.stringify(item, null, 2)),
  ]);
}

function pretty(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" ? JSON.stringify(value, null, 2) : text;
  } catch {
    return text;
  }
}

function copyButton(label, text) {
  const button = iconButton("copy", label, () => copy(text(), button));
  return button;
}

function usageParts({ usage, ms, model }) {
  const parts = [];
  if (usage?.completion_tokens) parts.push(`${usage.completion_tokens} tokens`);
  if (!parts.length) return [];
  if (ms) parts.push(seconds(ms));
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const read = `${usage.prompt_tokens} tokens read${cached ? `, ${cached} of them from the cache` : ""}`;
  return [h("span", { title: [model, read].filter(Boolean).join(" · ") }, parts.join(" · "))];
}

function seconds(ms) {
  if (ms < 9950) return `${Math.max(ms / 1000, 0.1).toFixed(1)} s`;
  const all = Math.round(ms / 1000);
  return all < 60 ? `${all} s` : `${Math.floor(all / 60)} min ${all % 60} s`;
}

/** Says what a screen reader should hear when an answer ends. */
export function announceAnswer({ state, text, calls }) {
  if (state === "failed") return; // the note about it is an alert
  const called = calls.map((call) => call.name).join(", ");
  const parts = [state === "stopped" && "Stopped.", text, called && `The model calls ${called}.`].filter(Boolean);
  announce(parts.join(" ") || "The model gave no answer.");
}
