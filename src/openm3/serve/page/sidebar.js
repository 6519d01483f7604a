// The list of conversations: open, rename, delete.

import { byId, h, iconButton } from "./dom.js";

const DAY = 86_400_000;

export class Sidebar {
  /** actions: {open(chat), rename(chat, title), remove(chat)}. */
  constructor(actions) {
    this.actions = actions;
    this.list = byId("chats");
    byId("open-sidebar").addEventListener("click", () => this.toggle(true));
    byId("close-sidebar").addEventListener("click", () => this.toggle(false));
    byId("shade").addEventListener("click", () => this.toggle(false));
    byId("sidebar").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.opened) (event.stopPropagation(), this.toggle(false));
    });
    this.narrow = matchMedia("(max-width: 800px)");
    this.narrow.addEventListener("change", () => this.toggle(false));
    this.toggle(false);
  }

  /** On a narrow window the list lies over the page while it is open; on a wide one it is always there. */
  toggle(open) {
    const back = this.opened && !open && this.narrow.matches;
    this.opened = open;
    document.body.classList.toggle("sidebar-open", open);
    byId("sidebar").inert = this.narrow.matches && !open;
    byId("main").inert = this.narrow.matches && open;
    if (open) byId("close-sidebar").focus();
    else if (back) byId("open-sidebar").focus();
  }

  /** chats: the latest first; running: the ids of those being answered. */
  show(chats, current, running) {
    if (this.renaming) return;
    const focused = document.activeElement?.closest("#chats li")?.dataset.chat;
    const rows = [];
    let group = null;
    for (const chat of chats.filter((each) => each.started)) {
      const name = age(chat.updated);
      if (name !== group) rows.push(h("li", { class: "group" }, name));
      group = name;
      rows.push(this.row(chat, chat === current, running.has(chat.id)));
    }
    if (!rows.length) rows.push(h("li", { class: "group" }, "No conversations yet"));
    this.list.replaceChildren(...rows);
    if (focused) this.list.querySelector(`[data-chat="${focused}"] .open`)?.focus();
  }

  row(chat, current, running) {
    const open = h("button", { type: "button", class: "open", title: chat.title, "aria-current": current && "page",
      onclick: () => (this.actions.open(chat), this.toggle(false)), ondblclick: () => this.rename(chat, row) },
      h("span", {}, chat.title), running && h("i", { class: "busy", role: "img", "aria-label": "being answered" }));
    const row = h("li", { class: `chat${current ? " current" : ""}`, "data-chat": chat.id }, open,
      h("div", { class: "row-actions" },
        iconButton("pencil", `Rename ${chat.title}`, () => this.rename(chat, row)),
        iconButton("bin", `Delete ${chat.title}`, () => this.actions.remove(chat))));
    return row;
  }

  rename(chat, row) {
    const label = "Name of the conversation";
    const box = h("input", { class: "rename", value: chat.title, maxlength: "120", "aria-label": label });
    this.renaming = true;
    let ended = false;
    const end = (keep) => {
      if (ended) return;
      ended = true;
      this.renaming = false;
      this.actions.rename(chat, (keep && box.value.trim()) || chat.title);
      this.list.querySelector(`[data-chat="${chat.id}"] .open`)?.focus();
    };
    box.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") (event.stopPropagation(), end(false));
    });
    box.addEventListener("blur", () => end(true));
    row.replaceChildren(box);
    box.focus();
    box.select();
  }
}

function age(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  return time >= today - 7 * DAY ? "This week" : "Earlier";
}
