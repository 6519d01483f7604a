// Conversations in this browser: IndexedDB, or memory for this visit where the browser keeps nothing.
//
// chats     {id, title, named, created, updated, started, deleted, mode, settings,
//            draft: {text, media: [{id, kind, name}]}}
// messages  {chat, seq, role: "user", text, media} | {..., role: "assistant", text, thinking, calls, state, ...}
//           | {..., role: "tool", call, text}; seq counts from 0
// media     {id, chat, kind: "image" | "video", name, blob}

const STORES = { chats: "id", messages: ["chat", "seq"], media: "id" };
const UNDO_FOR = 60_000; // ms

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** A small setting kept by the browser, "" if there is none. */
export function recall(name) {
  try {
    return localStorage.getItem(`openm3.${name}`) ?? "";
  } catch {
    return "";
  }
}

/** Keeps a small setting where the browser lets us; elsewhere it lasts as long as the page does. */
export function remember(name, value) {
  try {
    localStorage.setItem(`openm3.${name}`, value);
  } catch {
    return;
  }
}

/** Opens the store. `lasting` is false where nothing outlives the page. */
export async function openStore() {
  try {
    return new Store(new Database(await openDatabase()));
  } catch {
    return new Store(new Memory());
  }
}

function openDatabase() {
  const request = indexedDB.open("openm3", 1);
  request.onupgradeneeded = () => {
    for (const [name, keyPath] of Object.entries(STORES)) {
      const store = request.result.createObjectStore(name, { keyPath });
      if (name === "media") store.createIndex("chat", "chat");
    }
  };
  return result(request);
}

class Store {
  constructor(tables) {
    this.tables = tables;
    this.lasting = tables instanceof Database;
  }

  /** All conversations, the latest first. */
  async chats() {
    const all = await this.tables.all("chats");
    return all.filter((chat) => !chat.deleted).sort((a, b) => b.updated - a.updated);
  }

  /** Conversations deleted a while ago (chat.deleted: when) go for good. */
  async purge() {
    for (const { id, deleted } of await this.tables.all("chats")) {
      if (deleted && Date.now() - deleted > UNDO_FOR) await this.forget(id);
    }
  }

  chat(id) {
    return this.tables.get("chats", id);
  }

  saveChat(chat) {
    return this.tables.put("chats", chat);
  }

  /** Removes a conversation and all that belongs to it. */
  async forget(id) {
    await this.cut(id, 0);
    await this.sweep(id, []);
    await this.tables.remove("chats", id);
  }

  /** A conversation's messages in order. */
  messages(chat) {
    return this.tables.range("messages", chat, 0);
  }

  saveMessage(message) {
    return this.tables.put("messages", message);
  }

  /** Removes a conversation's messages from `seq` on. */
  async cut(chat, seq) {
    const gone = await this.tables.range("messages", chat, seq);
    await Promise.all(gone.map((message) => this.tables.remove("messages", [chat, message.seq])));
  }

  saveMedia(media) {
    return this.tables.put("media", media);
  }

  media(id) {
    return this.tables.get("media", id);
  }

  /** Removes a conversation's media that are not among `kept` (ids). */
  async sweep(chat, kept) {
    const ids = await this.tables.mediaOf(chat);
    await Promise.all(ids.filter((id) => !kept.includes(id)).map((id) => this.tables.remove("media", id)));
  }
}

class Database {
  constructor(database) {
    this.database = database;
    database.onversionchange = () => database.close();
  }

  /** Writes are on disk when this resolves. */
  write(name, act) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(name, "readwrite");
      transaction.oncomplete = () => resolve();
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
      act(transaction.objectStore(name));
      transaction.commit(); // at once: a page that is closed now would take an open transaction with it
    });
  }

  read(name) {
    return this.database.transaction(name).objectStore(name);
  }

  async all(name) {
    return result(this.read(name).getAll());
  }

  async get(name, key) {
    return result(this.read(name).get(key));
  }

  async put(name, value) {
    return this.write(name, (store) => store.put(value));
  }

  async remove(name, key) {
    return this.write(name, (store) => store.delete(key));
  }

  async range(name, chat, seq) {
    return result(this.read(name).getAll(IDBKeyRange.bound([chat, seq], [chat, Infinity])));
  }

  async mediaOf(chat) {
    return result(this.read("media").index("chat").getAllKeys(chat));
  }
}

class Memory {
  constructor() {
    this.tables = Object.fromEntries(Object.keys(STORES).map((name) => [name, new Map()]));
  }

  async all(name) {
    return [...this.tables[name].values()];
  }

  async get(name, key) {
    return this.tables[name].get(String(key));
  }

  async put(name, value) {
    const path = [STORES[name]].flat();
    this.tables[name].set(String(path.map((field) => value[field])), value);
  }

  async remove(name, key) {
    this.tables[name].delete(String(key));
  }

  async range(name, chat, seq) {
    return (await this.all(name)).filter((row) => row.chat === chat && row.seq >= seq).sort((a, b) => a.seq - b.seq);
  }

  async mediaOf(chat) {
    return (await this.all("media")).filter((media) => media.chat === chat).map((media) => media.id);
  }
}
