// The page: which conversation is open, what is being answered, and how the parts talk to each other.

import { listModels } from "./api.js";
import { announce, byId, h, icon, newId, toast } from "./dom.js";
import { Composer } from "./composer.js";
import { Shelf } from "./media.js";
import { announceAnswer, AnswerView, QuestionView } from "./message.js";
import { newAnswer, Run } from "./run.js";
import { exampleTools, Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore, recall, remember } from "./store.js";

const NEAR_BOTTOM = 60; // pixels
const BY_HAND = 500; // ms after a touch of the reader's that a scroll is theirs
const VIEWS = { user: QuestionView, assistant: AnswerView };
const tab = newId();

class App {
  async start() {
    this.store = await openStore();
    this.shelf = new Shelf(this.store);
    this.runs = new Map(); // conversation id to the Run that answers it here
    this.elsewhere = new Map(); // another tab's id to the conversations it answers
    this.models = [];
    this.views = [];
    this.thread = [];
    const changed = (chat) => this.saveChat(chat);
    this.sidebar = new Sidebar({
      open: (chat) => this.open(chat),
      rename: (chat, title) => this.rename(chat, title),
      remove: (chat) => this.remove(chat),
    });
    this.settings = new Settings({ changed, keyChanged: () => this.loadModels().catch(() => {}) });
    this.composer = new Composer({
      store: this.store,
      shelf: this.shelf,
      actions: {
        changed,
        send: (question) => this.send(question),
        stop: () => this.run?.stop(),
        editLast: () => this.editLast(),
      },
    });
    await this.rescue();
    await this.store.purge();
    this.chats = await this.store.chats();
    await this.open(this.chatOfAddress() ?? this.blankChat(), false);
    this.listen();
    if (!this.store.lasting) toast("This browser keeps nothing: conversations are gone when the page closes.");
    this.loadModels().catch(() => {});
    this.composer.focus();
    document.body.classList.add("ready");
  }

  get run() {
    return this.runs.get(this.chat.id);
  }

  listen() {
    byId("new-chat").addEventListener("click", () => this.newChat());
    byId("new-chat-too").addEventListener("click", () => this.newChat());
    byId("open-settings").addEventListener("click", () => this.settings.open(this.chat));
    byId("model").addEventListener("change", (event) => {
      this.chat.model = event.target.value;
      remember("model", this.chat.model);
      this.saveChat(this.chat);
    });
    byId("skip").addEventListener("click", (event) => (event.preventDefault(), this.composer.box.focus()));
    addEventListener("popstate", () => this.open(this.chatOfAddress() ?? this.blankChat(), false));
    addEventListener("keydown", (event) => this.key(event));
    addEventListener("pagehide", () => this.leave());
    addEventListener("pageshow", (event) => event.persisted && location.reload());
    this.followEnd();
    this.channel = new BroadcastChannel("openm3");
    this.channel.addEventListener("message", ({ data }) => this.hear(data));
    this.channel.postMessage({ kind: "hello" });
  }

  key(event) {
    const typing = event.target.closest?.("input, textarea, select, dialog");
    const command = event.metaKey || event.ctrlKey;
    if (command && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      this.newChat();
    } else if (event.key === "/" && !typing && !command) {
      event.preventDefault();
      this.composer.box.focus();
    } else if (event.key === "Escape" && this.run && !document.querySelector("dialog[open]")) this.run.stop();
  }

  // Conversations

  /** A conversation not yet begun; there is at most one. */
  blankChat() {
    const old = this.chats.find((chat) => !chat.started);
    if (old) return old;
    const now = Date.now();
    const mode = ["enabled", "adaptive", "disabled"].find((each) => each === recall("mode")) ?? "adaptive";
    const draft = { text: "", media: [] };
    const times = { created: now, updated: now, started: false };
    const chat = { id: newId(), title: "New conversation", ...times, mode, settings: {}, draft };
    this.chats.unshift(chat);
    return chat;
  }

  chatOfAddress() {
    return this.chats.find((chat) => location.hash === `#/${chat.id}`);
  }

  newChat() {
    this.sidebar.toggle(false);
    this.open(this.blankChat());
    this.composer.focus();
  }

  async open(chat, asStep = true) {
    if (chat === this.chat) return;
    this.opening = chat;
    const thread = this.runs.get(chat.id)?.thread ?? (await this.store.messages(chat.id));
    if (this.opening !== chat) return; // another was opened meanwhile
    if (thread.length && thread.at(-1).role !== "assistant") thread.push(newAnswer(chat, thread.length));
    this.chat = chat;
    this.thread = thread;
    const address = chat.started ? `#/${chat.id}` : location.pathname + location.search;
    if (asStep) history.pushState(null, "", address);
    this.composer.show(chat);
    this.showModel();
    this.showThread();
    this.toBottom();
    this.refresh();
  }

  /** Saves a conversation; one without a message or a draft has nothing worth keeping. */
  async saveChat(chat) {
    if (!chat.started && !chat.draft.text && !chat.draft.media.length && !Object.values(chat.settings).some(Boolean)
      && !(await this.store.chat(chat.id))) return;
    await this.store.saveChat(chat).catch((error) => this.unsaved(error));
  }

  unsaved(error) {
    if (error?.name !== "QuotaExceededError") toast("This could not be saved in the browser.");
    else toast("The browser's storage is full: delete old conversations to keep new ones.");
  }

  async rename(chat, title) {
    if (title !== chat.title) Object.assign(chat, { title, named: true });
    this.refresh();
    await this.saveChat(chat);
    this.tell({ kind: "changed", chat: chat.id });
  }

  async remove(chat) {
    this.runs.get(chat.id)?.stop();
    chat.deleted = Date.now();
    this.chats = this.chats.filter((other) => other !== chat);
    if (chat === this.chat) this.open(this.blankChat());
    this.refresh();
    toast(`“${short(chat.title, 40)}” is deleted.`, { label: "Undo", run: () => this.restore(chat) });
    announce(`${chat.title} deleted`);
    await this.saveChat(chat);
    this.tell({ kind: "changed", chat: chat.id });
  }

  async restore(chat) {
    chat.deleted = 0;
    this.chats = [...this.chats, chat].sort((a, b) => b.updated - a.updated);
    await this.saveChat(chat);
    this.open(chat);
    this.tell({ kind: "changed", chat: chat.id });
  }

  // Questions and answers

  async send({ text, media, edited }) {
    const { chat, thread } = this;
    if (edited) thread.length = edited.seq;
    const message = { chat: chat.id, seq: thread.length, role: "user", text, media };
    thread.push(message);
    if (!chat.named && message.seq === 0) chat.title = titleOf(message);
    if (!chat.started) {
      chat.started = true;
      history.replaceState(null, "", `#/${chat.id}`);
    }
    await this.store.saveMessage(message).catch((error) => this.unsaved(error));
    if (edited) await this.store.cut(chat.id, thread.length); // only now, when the new question is safe
    if (edited) this.sweep(chat, thread);
    this.answer(chat, thread);
  }

  /** Pictures of a question that was replaced are no one's any more. */
  sweep(chat, thread) {
    const kept = [...thread.flatMap((message) => message.media ?? []), ...chat.draft.media].map((item) => item.id);
    this.store.sweep(chat.id, kept).catch(() => {});
  }

  /** Answers a conversation as it stands. replaced: its last answer until now, which a failure brings back. */
  async answer(chat, thread, replaced) {
    thread.push(newAnswer(chat, thread.length));
    const run = new Run({
      chat, thread, store: this.store, shelf: this.shelf, key: recall("key"),
      model: () => this.modelFor(chat),
      changed: () => this.draw(run),
      unsaved: (error) => this.unsaved(error),
    });
    this.runs.set(chat.id, run);
    chat.updated = Date.now();
    this.chats.sort((a, b) => b.updated - a.updated);
    this.saveChat(chat);
    if (chat === this.chat) {
      this.showThread();
      this.toBottom();
    }
    this.refresh();
    announce("Answering");
    this.tellRunning(chat);
    await run.finished();
    this.runs.delete(chat.id);
    if (replaced?.text && run.came === 0) await this.bringBack(thread, replaced, run.message.error);
    if (chat === this.chat) {
      this.updateViews();
      announceAnswer(run.message);
    }
    this.refresh();
    this.tellRunning(chat);
  }

  retry() {
    if (!this.run) this.answer(this.chat, this.thread, this.thread.pop());
  }

  /** An answer is only ever replaced by another one. */
  async bringBack(thread, message, error) {
    thread[thread.length - 1] = message;
    if (error) toast(error);
    await this.store.saveMessage(message).catch((problem) => this.unsaved(problem));
    if (thread === this.thread) this.showThread();
  }

  async answerCalls(results) {
    const { chat, thread } = this;
    for (const result of results) {
      const message = { chat: chat.id, seq: thread.length, role: "tool", ...result };
      thread.push(message);
      await this.store.saveMessage(message).catch((error) => this.unsaved(error));
    }
    this.answer(chat, thread);
    this.composer.focus();
  }

  editLast() {
    const message = this.thread.findLast((each) => each.role === "user");
    if (message && !this.run) this.composer.edit(message);
  }

  /** One redraw for all that came since the last frame. */
  draw(run) {
    if (run.chat !== this.chat || this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      if (run.chat === this.chat) this.updateViews();
    });
  }

  // What is shown

  /** The end of the conversation stays in view while it grows, until the reader scrolls away from it. */
  followEnd() {
    const scroller = byId("scroll");
    const near = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_BOTTOM;
    let touched = 0; // when the reader last did something that scrolls; the page itself scrolls too
    for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
      scroller.addEventListener(kind, () => (touched = performance.now()), { passive: true });
    }
    scroller.addEventListener("pointermove", (event) => event.buttons && (touched = performance.now()));
    const look = () => {
      if (near()) this.follow = true;
      else if (performance.now() - touched < BY_HAND) this.follow = false;
      byId("to-bottom").hidden = this.follow;
    };
    scroller.addEventListener("scroll", look);
    scroller.addEventListener("click", (event) => event.target.closest("summary") && (this.follow = false));
    scroller.addEventListener("toggle", look, { capture: true });
    byId("to-bottom").addEventListener("click", () => {
      scroller.scrollTo({ top: scroller.scrollHeight, behavior: "smooth" });
    });
    const observer = new ResizeObserver(() => this.follow && this.toBottom());
    observer.observe(byId("thread"));
    observer.observe(scroller);
  }

  showThread() {
    const actions = {
      edit: (message) => this.composer.edit(message),
      retry: () => this.retry(),
      answerCalls: (results) => this.answerCalls(results),
      settings: () => this.settings.open(this.chat, "key"),
    };
    const context = { shelf: this.shelf, actions };
    const old = new Map(this.views.map((view) => [view.message, view]));
    this.views = this.thread
      .filter((message) => message.role !== "tool")
      .map((message) => old.get(message) ?? new VIEWS[message.role](message, context));
    byId("thread").replaceChildren(...this.views.map((view) => view.element));
    this.updateViews();
  }

  updateViews() {
    const tools = this.thread.filter((message) => message.role === "tool");
    const results = Object.fromEntries(tools.map((message) => [message.call, message.text]));
    const running = this.run?.message;
    const elsewhere = [...this.elsewhere.values()].some((chats) => chats.includes(this.chat.id));
    const lastQuestion = this.thread.findLast((each) => each.role === "user");
    for (const view of this.views) {
      const last = view.message === this.thread.at(-1) || (view.message === lastQuestion && !running && !elsewhere);
      view.update({ last, running: view.message === running, elsewhere: elsewhere && last, results });
    }
  }

  refresh() {
    const busy = new Set([...this.runs.keys(), ...[...this.elsewhere.values()].flat()]);
    this.sidebar.show(this.chats, this.chat, busy);
    this.composer.setRunning(Boolean(this.run));
    byId("title").textContent = this.chat.title;
    document.title = this.chat.started ? `${short(this.chat.title, 60)} · openm3` : "openm3";
    byId("welcome").hidden = this.thread.length > 0;
    byId("main").classList.toggle("blank", !this.thread.length);
  }

  toBottom() {
    this.follow = true;
    byId("to-bottom").hidden = true;
    byId("scroll").scrollTop = byId("scroll").scrollHeight;
  }

  // Models

  async loadModels() {
    try {
      this.models = await listModels(recall("key"));
    } catch (error) {
      this.models = [];
      this.showNotice(error);
      throw error;
    }
    this.showNotice(null);
    this.showModel();
  }

  async modelFor(chat) {
    if (!this.models.length) await this.loadModels();
    return [chat.model, recall("model")].find((name) => this.models.includes(name)) ?? this.models[0];
  }

  showModel() {
    const names = this.models;
    const current = [this.chat.model, recall("model")].find((name) => names.includes(name)) ?? names[0];
    const choice = (name) => h("option", { value: name, selected: name === current }, baseName(name));
    byId("model").replaceChildren(...names.map(choice));
    byId("model").hidden = names.length < 2;
    byId("model-name").textContent = names.length === 1 ? baseName(current) : "";
    byId("model-name").title = current ?? "";
    this.showSuggestions(current);
  }

  showNotice(error) {
    const again = () => this.loadModels().catch(() => {});
    const needsKey = error?.status === 401;
    byId("notice").hidden = !error;
    const act = needsKey ? () => this.settings.open(this.chat, "key") : again;
    const button = h("button", { type: "button", class: "link", onclick: act }, needsKey ? "Enter a key" : "Try again");
    byId("notice").replaceChildren(icon("missing"), h("p", {}, error?.message ?? "", button));
  }

  /** The bundled model knows a small world; these lead into it. */
  showSuggestions(model) {
    const suggest = (text, note, act) =>
      h("button", { type: "button", class: "suggestion", onclick: act }, h("strong", {}, text), h("span", {}, note));
    const ask = (text) => this.send({ text, media: [], edited: null });
    byId("suggestions").replaceChildren(...(/nano/i.test(model ?? "") ? [
      suggest("What is 478 + 356?", "A sum it thinks about", () => ask("What is 478 + 356?")),
      suggest("What is at the top left?", "A question about a picture", () => this.askAboutPicture()),
      suggest("Weather in Paris?", "A tool call; you give the result", () => {
        this.chat.settings.tools = exampleTools;
        ask("Get the weather with city Paris, unit celsius. What is the temperature?");
      }),
    ] : []));
  }

  async askAboutPicture() {
    const blob = await (await fetch("shapes.png")).blob();
    await this.composer.addFiles([new File([blob], "shapes.png", { type: "image/png" })]);
    this.composer.box.value = "What is at the top left?";
    this.composer.submit();
  }

  // Other tabs, and leaving

  tell(message) {
    this.channel.postMessage({ ...message, tab });
  }

  tellRunning(chat) {
    this.tell({ kind: "running", chats: [...this.runs.keys()] });
    this.tell({ kind: "changed", chat: chat.id });
  }

  async hear({ kind, tab: from, chats, chat }) {
    if (kind === "hello" && this.runs.size) this.tell({ kind: "running", chats: [...this.runs.keys()] });
    if (kind === "running") {
      this.elsewhere.set(from, chats);
      this.updateViews();
      this.refresh();
    }
    if (kind === "changed") await this.reload(chat);
  }

  /** Another tab has changed a conversation. */
  async reload(id) {
    const known = new Map(this.chats.map((chat) => [chat.id, chat]));
    const fresh = await this.store.chats();
    const blank = this.chats.filter((chat) => !chat.started && !fresh.some((other) => other.id === chat.id));
    this.chats = [...blank, ...fresh.map((chat) => {
      const mine = known.get(chat.id);
      return mine ? Object.assign(mine, { ...chat, draft: mine.draft }) : chat;
    })];
    if (!this.chats.includes(this.chat)) return this.open(this.blankChat());
    if (id === this.chat.id && !this.run) {
      this.thread = await this.store.messages(id);
      this.showThread();
    }
    this.refresh();
  }

  /** What a closing page cannot wait for to be written: the answers under way, and the draft. */
  leave() {
    if (this.runs.size || this.composer.timer) {
      const messages = [...this.runs.values()].map((run) => run.message);
      remember(`rescue.${tab}`, JSON.stringify({ messages, chat: this.composer.timer ? this.chat : null }));
    }
    if (this.runs.size) this.tell({ kind: "running", chats: [] });
  }

  async rescue() {
    let names;
    try {
      names = Object.keys(localStorage).filter((name) => name.startsWith("openm3.rescue."));
    } catch {
      return; // nothing is kept, so nothing was lost
    }
    for (const name of names) {
      const { messages, chat } = JSON.parse(localStorage.getItem(name));
      localStorage.removeItem(name);
      if (chat) await this.store.saveChat(chat);
      for (const message of messages) if (await this.store.chat(message.chat)) await this.store.saveMessage(message);
    }
  }
}

const baseName = (name) => name.split("/").filter(Boolean).at(-1) ?? name;
const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1).trimEnd()}…` : text);

function titleOf({ text, media }) {
  const line = text.split("\n").find((each) => each.trim());
  if (line) return short(line.trim(), 80);
  return media.length > 1 ? `${media.length} pictures` : media[0].kind === "image" ? "A picture" : "A video";
}

new App().start();
