// Pictures and videos: from files to what is kept and sent, and from what is kept to what is shown.

import { h, icon, newId } from "./dom.js";

const LARGEST_SIDE = 2048; // pixels; models look at far fewer
const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/** A file that cannot be shown to the model; the message says why. */
export class MediaError extends Error {}

/** {id, kind, name, blob} of a file the user gave. A large or unusual picture is drawn anew, a video stays as it is. */
export async function readFile(file) {
  const kind = kindOf(file);
  const name = file.name || (kind === "image" ? "picture" : "video");
  if (!kind) throw new MediaError(`${name} is neither a picture nor a video.`);
  if (!file.size) throw new MediaError(`${name} is empty.`);
  const blob = kind === "image" ? await readImage(file, name) : file;
  // A copy: the file itself may be gone or changed when the conversation is opened again.
  return { id: newId(), kind, name, blob: new Blob([await blob.arrayBuffer()], { type: blob.type || "video/mp4" }) };
}

function kindOf(file) {
  const [kind] = file.type.split("/");
  if (kind === "image" || kind === "video") return kind;
  if (/\.(mp4|m4v|mov|webm|mkv|avi)$/i.test(file.name)) return "video";
  return /\.(png|jpe?g|webp|gif|bmp|avif)$/i.test(file.name) ? "image" : null;
}

async function readImage(file, name) {
  const picture = await decode(file, name);
  const { naturalWidth: width, naturalHeight: height } = picture;
  const scale = Math.min(1, LARGEST_SIDE / Math.max(width, height));
  if (scale === 1 && SENT_AS_IS.includes(file.type)) return file;
  const scaled = (side) => Math.max(1, Math.round(side * scale));
  const canvas = h("canvas", { width: scaled(width), height: scaled(height) });
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  const photo = file.type === "image/jpeg"; // anything else may be transparent
  return new Promise((resolve) => canvas.toBlob(resolve, photo ? "image/jpeg" : "image/png", 0.92));
}

/** Through an <img>, which turns a photo the right way up and reads every format the browser knows. */
async function decode(file, name) {
  const url = URL.createObjectURL(file);
  const picture = h("img", { src: url });
  try {
    await picture.decode();
  } catch {
    throw new MediaError(`${name} cannot be read as a picture.`);
  } finally {
    URL.revokeObjectURL(url);
  }
  return picture;
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The files of a drop or a paste. */
export const filesOf = (transfer) => [...(transfer?.files ?? [])];

/** Object URLs of stored media, one for each. */
export class Shelf {
  constructor(store) {
    this.store = store;
    this.urls = new Map();
  }

  /** The URL of a medium, or null if it is no longer stored. */
  async url(id) {
    if (!this.urls.has(id)) {
      const media = await this.store.media(id);
      if (!media) return null;
      if (!this.urls.has(id)) this.urls.set(id, URL.createObjectURL(media.blob));
    }
    return this.urls.get(id);
  }

  async dataUrl({ id, name }) {
    const media = await this.store.media(id);
    if (!media) throw new MediaError(`${name} is no longer stored in this browser.`);
    return dataUrl(media.blob);
  }
}

/** A small picture of a medium that opens it large. */
export function thumbnail(item, shelf) {
  const label = `${item.kind === "image" ? "Picture" : "Video"} ${item.name}`;
  const frame = h("button", { type: "button", class: "thumbnail", title: item.name, "aria-label": `${label}, open` });
  shelf.url(item.id).then((url) => {
    if (!url) return frame.replaceChildren(icon("missing"));
    frame.replaceChildren(...(item.kind === "image" ? [h("img", { src: url, alt: "" })] : film(url)));
    frame.addEventListener("click", () => enlarge(item, url, label));
  });
  return frame;
}

/** A video's first frame; a film strip shows behind it where the browser cannot play it. */
function film(url) {
  const video = h("video", { src: `${url}#t=0.1`, preload: "auto", playsinline: true, tabindex: "-1" });
  video.muted = true;
  return [icon("film"), video, h("span", { class: "play" }, icon("play"))];
}

function enlarge(item, url, label) {
  const shown = item.kind === "image"
    ? h("img", { src: url, alt: label })
    : h("video", { src: url, controls: true, autoplay: true, loop: true, playsinline: true, "aria-label": label });
  const act = { onclick: () => dialog.close(), onclose: () => dialog.remove() };
  const dialog = h("dialog", { class: "lightbox", "aria-label": label, ...act }, shown, h("p", {}, item.name));
  shown.addEventListener("click", (event) => item.kind === "video" && event.stopPropagation());
  document.body.append(dialog);
  dialog.showModal();
}
