// Markdown to DOM nodes: the part of it that models write. No markup of the model's ever reaches the page as markup, no
// link but http, https and mailto is followed, and nothing is fetched: a picture becomes a link to it.
//
// A text is split into blocks first. While an answer streams, blocks that have not changed keep their nodes, so that
// what a reader has selected or scrolled stays, and a long answer is not drawn again and again.

import { copy, h, icon } from "./dom.js";

const DEEPEST = 12; // lists in lists and quotes in quotes; what is deeper is shown as it is written
const LONGEST = 2000; // letters of a link, so that a row of open brackets is read in linear time

/** Shows a text in an element; `show` again with a longer text changes only what is new. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.blocks = [];
  }

  show(text) {
    const blocks = splitBlocks(text.split(/\r\n|\n/), 0);
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.blocks[same]?.source) same++;
    for (let i = same; i < blocks.length; i++) {
      const node = this.element.children[i];
      if (node && blocks[i].kind === "code" && grow(node, this.blocks[i], blocks[i])) continue;
      const made = renderBlock(blocks[i], 0);
      if (node) node.replaceWith(made);
      else this.element.append(made);
    }
    while (this.element.children.length > blocks.length) this.element.lastElementChild.remove();
    this.blocks = blocks;
  }
}

/** A code block that only got longer keeps its node, and with it where the reader has scrolled. */
function grow(node, before, block) {
  if (before?.kind !== "code" || before.language !== block.language) return false;
  node.querySelector("code").textContent = block.text;
  return true;
}

// Blocks

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*))?$/;
const CELLS = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const MATH = [["$$", "$$"], ["\\[", "\\]"]];

function splitBlocks(lines, depth) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const [block, end] = readBlock(lines, i, depth);
    blocks.push({ ...block, source: lines.slice(i, end).join("\n") });
    i = end;
  }
  return blocks;
}

/** [the block that begins at line i, the line after it]. */
function readBlock(lines, i, depth) {
  const line = lines[i];
  const heading = line.match(HEADING);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] ?? "" }, i + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  if (FENCE.test(line)) return readCode(lines, i);
  const math = MATH.find(([open]) => line.trimStart().startsWith(open));
  if (math) return readMath(lines, i, math[1]);
  if (depth < DEEPEST && QUOTE.test(line)) return readQuote(lines, i);
  if (depth < DEEPEST && ITEM.test(line)) return readList(lines, i);
  if (isTable(lines, i)) return readTable(lines, i);
  return readParagraph(lines, i, depth);
}

function readCode(lines, i) {
  const [, fence, language] = lines[i].match(FENCE);
  const indent = lines[i].search(/\S/);
  const closes = (line) => line.trim().length >= fence.length && line.trim() === fence[0].repeat(line.trim().length);
  let end = i + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const body = lines.slice(i + 1, end).map((line) => line.slice(Math.min(indent, line.search(/\S|$/))));
  return [{ kind: "code", language, text: body.join("\n") }, Math.min(end + 1, lines.length)];
}

function readMath(lines, i, close) {
  let end = i;
  const closed = (line, start) => line.indexOf(close, start) >= 0;
  const first = lines[i].search(/\S/) + 2;
  if (!closed(lines[i], first)) {
    end++;
    while (end < lines.length && lines[end].trim() && !closed(lines[end], 0)) end++;
  }
  end = Math.min(end + 1, lines.length);
  return [{ kind: "math", text: lines.slice(i, end).join("\n").trim() }, end];
}

function readQuote(lines, i) {
  let end = i;
  while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !startsBlock(lines, end))) end++;
  return [{ kind: "quote", lines: lines.slice(i, end).map((line) => line.replace(QUOTE, "")) }, end];
}

/** Models indent by two, three or four spaces as they like: what stands further in than the marker is the item's. */
function readList(lines, i) {
  const [, margin, marker] = lines[i].match(ITEM);
  const ordered = /\d/.test(marker);
  const items = [];
  let loose = false;
  let end = i;
  while (end < lines.length) {
    const line = lines[end];
    const item = line.match(ITEM);
    const indent = line.search(/\S|$/);
    const here = indent <= margin.length + 1;
    if (!line.trim()) {
      let next = end;
      while (next < lines.length && !lines[next].trim()) next++;
      if (next === lines.length || !continues(lines[next], margin.length, ordered)) break;
      items.at(-1).push(...lines.slice(end, next).fill(""));
      loose ||= lines[next].search(/\S/) <= margin.length + 1;
      end = next - 1;
    } else if (item && here && !RULE.test(line)) {
      if (/\d/.test(item[2]) !== ordered) break;
      items.push([item[4] ?? ""]);
    } else if (here && (startsBlock(lines, end) || !lines[end - 1].trim())) break;
    else items.at(-1).push(dedent(line, margin.length + (ordered ? marker.length + 1 : 2)));
    end++;
  }
  return [{ kind: "list", ordered, loose, start: parseInt(marker, 10), items }, end];
}

function continues(line, margin, ordered) {
  const item = line.match(ITEM);
  if (item && item[1].length <= margin + 1) return /\d/.test(item[2]) === ordered && !RULE.test(line);
  return line.search(/\S/) > margin + 1;
}

const dedent = (line, width) => line.slice(Math.min(width, line.search(/\S|$/)));

const isTable = (lines, i) => lines[i].includes("|") && CELLS.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")
  && cells(lines[i]).length === cells(lines[i + 1]).length;

function readTable(lines, i) {
  let end = i + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const side = (cell) => (/^:.*:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : "left");
  const align = cells(lines[i + 1]).map(side);
  const rows = lines.slice(i + 2, end).map((line) => cells(line).slice(0, align.length));
  return [{ kind: "table", align, head: cells(lines[i]), rows }, end];
}

function cells(line) {
  const parts = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (parts.length > 1 && !parts.at(-1).trim()) parts.pop();
  return parts.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, i, depth) {
  let end = i + 1;
  while (end < lines.length && lines[end].trim() && (depth >= DEEPEST || !startsBlock(lines, end))) end++;
  return [{ kind: "paragraph", text: lines.slice(i, end).map((line) => line.trimStart()).join("\n") }, end];
}

/** Whether a line ends the paragraph before it. A number that ends up at a line's beginning is no list, but 1 is. */
function startsBlock(lines, i) {
  const line = lines[i];
  const item = line.match(ITEM);
  if (item) return Boolean(item[4]) && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return HEADING.test(line) || RULE.test(line) || FENCE.test(line) || QUOTE.test(line) || isTable(lines, i);
}

function renderBlock(block, depth) {
  switch (block.kind) {
    case "heading":
      return h(`h${Math.min(block.level + 2, 6)}`, {}, inline(block.text.trim().replace(/(^|[ \t])#+$/, "")));
    case "rule":
      return h("hr");
    case "code":
      return codeBlock(block);
    case "math":
      return h("p", { class: "math" }, block.text);
    case "quote":
      return h("blockquote", {}, splitBlocks(block.lines, depth + 1).map((inner) => renderBlock(inner, depth + 1)));
    case "list":
      return list(block, depth);
    case "table":
      return table(block);
    default:
      return h("p", {}, inline(block.text));
  }
}

function codeBlock({ language, text }) {
  const code = h("code", {}, text);
  const act = () => copy(code.textContent, button);
  const button = h("button", { type: "button", class: "quiet copy-code", onclick: act }, icon("copy"), "Copy");
  const name = language || "code";
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, name), button),
    h("pre", { tabindex: "0", "aria-label": `Code, ${name}` }, code));
}

function list({ ordered, loose, start, items }, depth) {
  const rows = items.map((lines) => {
    const task = lines[0].match(/^\[([ xX])\] +(.*)/);
    const blocks = splitBlocks(task ? [task[2], ...lines.slice(1)] : lines, depth + 1);
    const nodes = blocks.map((block, i) =>
      block.kind === "paragraph" && !loose && i === 0 ? inline(block.text) : renderBlock(block, depth + 1));
    if (!task) return h("li", {}, nodes);
    const done = task[1] !== " ";
    const look = { disabled: true, checked: done, "aria-label": done ? "done" : "to do" };
    return h("li", { class: "task" }, h("input", { type: "checkbox", ...look }), nodes);
  });
  return ordered ? h("ol", start === 1 ? {} : { start }, rows) : h("ul", {}, rows);
}

function table({ align, head, rows }) {
  const cell = (tag, text, side) => h(tag, { class: side, scope: tag === "th" && "col" }, inline(text ?? ""));
  const row = (tag, texts) => h("tr", {}, align.map((side, i) => cell(tag, texts[i], side)));
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, rows.map((texts) => row("td", texts)))));
}

// Inline

const URL_START = /^https?:\/\/[^\s<>"'`]+/;

/** A paragraph's text as a document fragment. linked: it stands in a link already, so it has none of its own. */
function inline(text, linked = false) {
  const fragment = document.createDocumentFragment();
  fragment.append(...emphasize(scan(text, linked)));
  return fragment;
}

/** A list of nodes and of runs of emphasis marks {mark, count, opens, closes}, which `emphasize` pairs. */
function scan(text, linked) {
  const out = [];
  let plain = "";
  const flush = () => {
    if (plain) out.push(document.createTextNode(plain));
    plain = "";
  };
  const add = (node) => (flush(), out.push(node));
  for (let i = 0; i < text.length; ) {
    const special = readSpecial(text, i, linked);
    if (special) {
      if (typeof special.node === "string") plain += special.node;
      else add(special.node);
      i = special.end;
    } else {
      plain += text[i];
      i++;
    }
  }
  flush();
  return out;
}

/** What begins at text[i], if it is more than a letter: {node, end}; node is a node, a string, or a run of marks. */
function readSpecial(text, i, linked) {
  switch (text[i]) {
    case "\\":
      return readEscape(text, i);
    case "\n":
      return { node: h("br"), end: i + 1 };
    case " ":
      return text.startsWith("  \n", i) ? { node: h("br"), end: i + 3 } : null;
    case "`":
      return readCodeSpan(text, i);
    case "$":
      return text[i + 1] === "$" ? readUntil(text, i, 2, "$$") : null;
    case "<":
      return readAngle(text, i, linked);
    case "!":
      return text[i + 1] === "[" && !linked ? readLink(text, i + 1, true) : null;
    case "[":
      return linked ? null : readLink(text, i, false);
    case "h":
      return linked ? null : readBareLink(text, i);
    case "*":
    case "_":
    case "~":
      return readMarks(text, i);
    default:
      return null;
  }
}

function readEscape(text, i) {
  const next = text[i + 1] ?? "";
  if (next === "(") return readUntil(text, i, 2, "\\)");
  if (next === "[") return readUntil(text, i, 2, "\\]") ?? { node: "[", end: i + 2 };
  if (next === "\n") return { node: h("br"), end: i + 2 };
  return /[!-/:-@[-`{-~]/.test(next) ? { node: next, end: i + 2 } : null;
}

/** Formulas stay as they are written, so that no * or _ in them is taken for emphasis. */
function readUntil(text, i, width, close) {
  const end = text.indexOf(close, i + width);
  if (end < 0) return null;
  return { node: h("span", { class: "math" }, text.slice(i, end + close.length)), end: end + close.length };
}

function readCodeSpan(text, i) {
  const ticks = text.slice(i).match(/^`+/)[0];
  let end = i + ticks.length;
  while ((end = text.indexOf(ticks, end)) >= 0) {
    const run = text.slice(end).match(/^`+/)[0].length;
    if (run === ticks.length) {
      const code = text.slice(i + run, end).replaceAll("\n", " ");
      const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
      return { node: h("code", {}, padded ? code.slice(1, -1) : code), end: end + run };
    }
    end += run;
  }
  return { node: ticks, end: i + ticks.length };
}

function readAngle(text, i, linked) {
  const length = text.slice(i, i + LONGEST).indexOf(">");
  if (length < 0) return null;
  const end = i + length;
  const inside = text.slice(i + 1, end);
  if (/^br *\/?$/i.test(inside)) return { node: h("br"), end: end + 1 };
  const href = !linked && /^(https?:|mailto:)\S+$/i.test(inside) && safeUrl(inside);
  return href ? { node: link(href, inside.replace(/^mailto:/i, "")), end: end + 1 } : null;
}

function readBareLink(text, i) {
  if (/\w/.test(text[i - 1] ?? "")) return null;
  const found = text.slice(i, i + LONGEST).match(URL_START)?.[0];
  if (!found) return null;
  let url = found.replace(/[.,;:!?*_~|]+$/, "");
  if (url.endsWith(")") && !url.includes("(")) url = url.replace(/\)+[.,;:!?*_~|]*$/, "");
  const href = safeUrl(url);
  return href ? { node: link(href, url), end: i + url.length } : null;
}

/** [text](url "title"), and ![text](url) as a link of the same kind. */
function readLink(text, i, picture) {
  const close = closing(text, i, "[", "]");
  if (close < 0 || text[close + 1] !== "(") return null;
  const end = closing(text, close + 1, "(", ")");
  if (end < 0) return null;
  const [url] = text.slice(close + 2, end).trim().split(/\s/, 1); // a title may follow
  const href = safeUrl(url.replace(/^<(.*)>$/, "$1"));
  if (!href) return null;
  const label = text.slice(i + 1, close);
  return { node: link(href, picture ? label || "picture" : inline(label, true)), end: end + 1 };
}

/** Where the bracket at text[i] closes, or -1. */
function closing(text, i, open, close) {
  const last = Math.min(text.length, i + LONGEST);
  for (let depth = 0, at = i; at < last; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === open) depth++;
    else if (text[at] === close && --depth === 0) return at;
  }
  return -1;
}

function safeUrl(url) {
  try {
    const { protocol, href } = new URL(url);
    return ["http:", "https:", "mailto:"].includes(protocol) ? href : null;
  } catch {
    return null;
  }
}

const link = (href, inner) => h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, inner);

function readMarks(text, i) {
  const mark = text[i];
  let end = i;
  while (text[end] === mark) end++;
  const count = end - i;
  const before = text[i - 1] ?? " ";
  const after = text[end] ?? " ";
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [pointBefore, pointAfter] = [/[\p{P}\p{S}]/u.test(before), /[\p{P}\p{S}]/u.test(after)];
  const left = !spaceAfter && (!pointAfter || spaceBefore || pointBefore);
  const right = !spaceBefore && (!pointBefore || spaceAfter || pointAfter);
  if ((!left && !right) || (mark === "~" && count !== 2)) return { node: mark.repeat(count), end };
  const inWord = mark === "_";
  const opens = left && (!inWord || !right || pointBefore);
  const closes = right && (!inWord || !left || pointAfter);
  return { node: { mark, count, opens, closes }, end };
}

/** Pairs the runs of marks, the innermost first, as CommonMark does. */
function emphasize(items) {
  const floor = {}; // for each mark, the place before which there is no opening run left
  for (let at = 0; at < items.length; at++) {
    const closer = items[at];
    if (!closer.mark || !closer.closes) continue;
    while (closer.count) {
      let from = at - 1;
      const least = floor[closer.mark] ?? 0;
      while (from >= least && !(items[from].mark === closer.mark && items[from].opens && items[from].count)) from--;
      if (from < least) {
        floor[closer.mark] = at;
        break;
      }
      const opener = items[from];
      const width = Math.min(opener.count, closer.count, 2);
      const tag = closer.mark === "~" ? "del" : width === 2 ? "strong" : "em";
      const element = h(tag, {}, items.slice(from + 1, at).map(asNode));
      opener.count -= width;
      closer.count -= width;
      items.splice(from + 1, at - from - 1, element);
      for (const mark in floor) floor[mark] = Math.min(floor[mark], from + 1);
      at = from + 2;
    }
  }
  return items.map(asNode);
}

const asNode = (item) => (item.mark ? document.createTextNode(item.mark.repeat(item.count)) : item);
