// Where a question is written: text, pictures and videos, the thinking mode, send and stop. What is not sent yet is
// kept with its conversation as a draft.

import { announce, byId, h, icon, iconButton, toast } from "./dom.js";
import { filesOf, MediaError, readFile, thumbnail } from "./media.js";
import { remember } from "./store.js";

const SAVE_AFTER = 300; // ms without a key
const onTouchScreen = () => matchMedia("(pointer: coarse)").matches;

export class Composer {
  /** actions: {send({text, media, edited}), stop(), editLast(), changed(chat)}; edited: the question to replace. */
  constructor({ store, shelf, actions }) {
    Object.assign(this, { store, shelf, actions });
    this.form = byId("composer");
    this.box = byId("question");
    this.list = byId("attachments");
    this.sendButton = byId("send");
    this.picker = byId("files");
    this.media = [];
    this.reading = 0; // files
    this.edited = null;
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.submit()));
    this.sendButton.addEventListener("click", (event) => this.running && (event.preventDefault(), actions.stop()));
    this.box.addEventListener("input", () => this.typed());
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("paste", (event) => this.paste(event));
    byId("attach").addEventListener("click", () => this.picker.click());
    this.picker.addEventListener("change", () => (this.addFiles([...this.picker.files]), (this.picker.value = "")));
    byId("cancel-edit").addEventListener("click", () => this.cancelEdit());
    for (const radio of this.modes()) radio.addEventListener("change", () => this.setMode(radio.value));
    addEventListener("resize", () => this.fit());
    this.acceptDrops();
    if (onTouchScreen()) this.box.placeholder = "Ask anything";
  }

  modes() {
    return [...this.form.elements.mode];
  }

  /** Shows a conversation's draft and mode. */
  show(chat) {
    this.flush();
    this.chat = chat;
    this.edited = null;
    this.fill(chat.draft);
    for (const radio of this.modes()) radio.checked = radio.value === chat.mode;
  }

  fill({ text, media }) {
    this.box.value = text;
    this.media = [...media];
    byId("editing").hidden = !this.edited;
    this.refresh();
    this.fit();
  }

  /** Where there is no touch screen, whose keyboard would cover the page. */
  focus() {
    if (!onTouchScreen()) this.box.focus();
  }

  setRunning(running) {
    this.running = running;
    this.refresh();
  }

  edit(message) {
    this.flush();
    this.edited = message;
    this.fill(message);
    this.box.focus();
    announce("Editing your last question");
  }

  cancelEdit() {
    this.edited = null;
    this.fill(this.chat.draft);
    this.box.focus();
  }

  setMode(mode) {
    this.chat.mode = mode;
    remember("mode", mode);
    this.actions.changed(this.chat);
  }

  submit() {
    const text = this.box.value.trim();
    if (this.running || this.reading || (!text && !this.media.length)) return;
    const { media, edited } = this;
    this.edited = null;
    if (!edited) this.chat.draft = { text: "", media: [] };
    this.fill(this.chat.draft);
    this.actions.send({ text, media, edited });
  }

  key(event) {
    if (event.isComposing) return;
    // On a touch screen return begins a new line, and the button sends.
    if (event.key === "Enter" && !event.shiftKey && (!onTouchScreen() || event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "Escape" && this.edited) {
      event.stopPropagation();
      this.cancelEdit();
    } else if (event.key === "ArrowUp" && !this.box.value && !this.edited) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  typed() {
    this.fit();
    this.refresh();
    this.keepDraft();
  }

  /** The draft is the conversation's, so an edit of an old question is none. */
  keepDraft() {
    if (this.edited) return;
    this.chat.draft = { text: this.box.value, media: this.media };
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.flush(), SAVE_AFTER);
  }

  flush() {
    if (!this.timer) return;
    clearTimeout(this.timer);
    this.timer = null;
    this.actions.changed(this.chat);
  }

  paste(event) {
    const files = filesOf(event.clipboardData);
    if (!files.length) return;
    event.preventDefault();
    this.addFiles(files);
  }

  acceptDrops() {
    const overlay = byId("drop");
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    let inside = 0; // elements entered and not yet left
    const count = (change) => (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      inside = Math.max(0, inside + change);
      overlay.hidden = !inside;
    };
    addEventListener("dragenter", count(1));
    addEventListener("dragleave", count(-1));
    addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      inside = 0;
      overlay.hidden = true;
      this.addFiles(filesOf(event.dataTransfer));
    });
  }

  async addFiles(files) {
    const { chat, edited } = this;
    this.reading += files.length;
    this.refresh();
    for (const file of files) {
      try {
        const media = { ...(await readFile(file)), chat: chat.id };
        await this.store.saveMedia(media);
        if (this.chat === chat && this.edited === edited) this.attach(media);
        else if (!edited) this.keepElsewhere(chat, media);
      } catch (error) {
        toast(error instanceof MediaError ? error.message : `${file.name} could not be stored: ${error.message}`);
      }
      this.reading--;
      this.refresh();
    }
    if (this.chat === chat) this.focus();
  }

  attach({ id, kind, name }) {
    this.media.push({ id, kind, name });
    announce(`${name} added`);
    this.refresh();
    this.keepDraft();
  }

  /** The reader has gone to another conversation while the file was read: it waits where it was dropped. */
  keepElsewhere(chat, { id, kind, name }) {
    chat.draft.media = [...chat.draft.media, { id, kind, name }];
    this.actions.changed(chat);
  }

  detach(item) {
    this.media = this.media.filter((other) => other !== item);
    announce(`${item.name} removed`);
    this.refresh();
    this.keepDraft();
    this.focus();
  }

  refresh() {
    this.showMedia();
    const { running } = this;
    const label = running ? "Stop the answer" : this.edited ? "Send the new question" : "Send";
    const ready = !this.reading && (this.box.value.trim() || this.media.length);
    this.sendButton.disabled = !running && !ready;
    this.sendButton.title = label;
    this.sendButton.setAttribute("aria-label", label);
    this.sendButton.classList.toggle("stop", Boolean(running));
    this.sendButton.querySelector("use").setAttribute("href", running ? "#icon-stop" : "#icon-send");
  }

  /** Thumbnails stay the same elements while others come and go. */
  showMedia() {
    this.shown ??= new Map();
    for (const [id, element] of this.shown) {
      if (this.media.some((item) => item.id === id)) continue;
      element.remove();
      this.shown.delete(id);
    }
    for (const item of this.media) {
      if (!this.shown.has(item.id)) this.shown.set(item.id, this.attachment(item));
      this.list.append(this.shown.get(item.id));
    }
    this.loading ??= h("li", { class: "loading", "aria-label": "Reading a file" }, icon("film"));
    if (this.reading) this.list.append(this.loading);
    else this.loading.remove();
    this.list.hidden = !this.list.children.length;
  }

  attachment(item) {
    const remove = iconButton("close", `Remove ${item.name}`, () => this.detach(item), "remove");
    return h("li", {}, thumbnail(item, this.shelf), remove);
  }

  /** As tall as its text, up to what the style sheet allows. */
  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${this.box.scrollHeight}px`;
  }
}
