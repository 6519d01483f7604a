// Small helpers around the DOM. Text only ever enters the page as text nodes and attributes, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("button", {class: "quiet", onclick: f, "aria-label": "Copy"}, "text", child, ...). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** One of the symbols of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon only; its label is its tooltip and what a screen reader says. */
export function iconButton(name, label, onclick, className = "quiet") {
  const look = { class: `icon-button ${className}`, title: label, "aria-label": label };
  return h("button", { type: "button", ...look, onclick }, icon(name));
}

export const byId = (id) => document.getElementById(id);

let copied = 0;

/** Copies a text; the button that was pressed shows a check mark for a moment. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copyBySelection(text)) return toast("The browser did not allow copying.");
  }
  const use = button.querySelector("use");
  const before = (button.dataset.icon ??= use.getAttribute("href"));
  const turn = String(++copied);
  button.dataset.turn = turn;
  use.setAttribute("href", "#icon-check");
  announce("Copied");
  setTimeout(() => button.dataset.turn === turn && use.setAttribute("href", before), 1500);
}

/** The older way: navigator.clipboard is missing on a page served over plain http from another machine. */
function copyBySelection(text) {
  const area = h("textarea", { class: "hidden", "aria-hidden": "true" });
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** Says a text through the screen reader, and nowhere else. */
export function announce(text) {
  byId("announcer").textContent = text;
}

let toastTimer;

/** A passing note at the foot of the page, with an action if one is given: {label, run}. */
export function toast(text, action) {
  const box = byId("toast");
  const close = () => box.replaceChildren();
  const act = () => (close(), action.run());
  const button = action && h("button", { type: "button", class: "link", onclick: act }, action.label);
  box.replaceChildren(h("div", { class: "toast" }, h("span", {}, text), button));
  clearTimeout(toastTimer);
  toastTimer = setTimeout(close, 7000);
}

/** A name that no other record has; crypto.randomUUID is missing on a page served over plain http. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
