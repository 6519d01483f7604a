// The server's API, in OpenAI's shape: the models it has, and an answer as it streams.

/** What went wrong, in words for the reader. status: the HTTP status, 0 where no answer came at all. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function request(path, { key, ...options }) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw new ApiError(await complaint(response), response.status);
  return response;
}

async function complaint(response) {
  const said = messageOf(await response.json().catch(() => null));
  if (response.status === 401) return "This server asks for an API key.";
  if (response.status === 413) return said ?? "The pictures and videos are more than this server takes.";
  if (response.status === 429) return said ?? "The server has too many requests right now.";
  if (response.status === 503) return said ?? "The server is not ready right now.";
  return said ?? `The server answered ${response.status} ${response.statusText}`.trim();
}

const messageOf = (body) => body?.error?.message ?? body?.message ?? null;

/** The names of the server's models. */
export async function listModels(key) {
  const body = await (await request("v1/models", { key })).json();
  return body.data.map((model) => model.id);
}

/** Streams an answer: an async iterator of the chunks of `/v1/chat/completions`. Throws ApiError, or AbortError. */
export async function* streamChat(body, { key, signal }) {
  const response = await request("v1/chat/completions", {
    key,
    signal,
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new ApiError(messageOf(chunk) ?? "The server failed.", chunk.error.code || 500);
    finished ||= Boolean(chunk.choices?.some((choice) => choice.finish_reason));
    yield chunk;
  }
  if (!finished) throw new ApiError("The connection broke before the answer was complete.");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is not JSON.");
  }
}

/** The data of each server-sent event in a byte stream, however it is split. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const lines = buffer.split(/\r\n|\n|\r(?!$)/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A conversation's messages as the API takes them. media: an async function from {id, kind} to a data URL. */
export async function apiMessages(messages, instructions, media) {
  const out = instructions?.trim() ? [{ role: "system", content: instructions }] : [];
  let open = []; // calls that have no result yet
  const close = () => {
    out.push(...open.map((id) => ({ role: "tool", tool_call_id: id, content: "No result was given." })));
    open = [];
  };
  for (const message of messages) {
    if (message.role === "tool") {
      open = open.filter((id) => id !== message.call);
      out.push({ role: "tool", tool_call_id: message.call, content: message.text });
      continue;
    }
    close();
    if (message.role === "user") out.push({ role: "user", content: await userContent(message, media) });
    else {
      const calls = message.calls.filter((call) => isObject(call.arguments));
      if (!message.text && !message.thinking && !calls.length) continue;
      out.push(assistantMessage(message, calls));
      open = calls.map((call) => call.id);
    }
  }
  close();
  return out;
}

async function userContent(message, media) {
  if (!message.media.length) return message.text;
  const parts = await Promise.all(
    message.media.map(async (item) => {
      const type = `${item.kind}_url`;
      return { type, [type]: { url: await media(item) } };
    }),
  );
  if (message.text) parts.push({ type: "text", text: message.text });
  return parts;
}

function assistantMessage(message, calls) {
  const out = { role: "assistant", content: message.text };
  if (message.thinking) out.reasoning_content = message.thinking;
  if (calls.length) {
    out.tool_calls = calls.map((call) => {
      return { id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } };
    });
  }
  return out;
}

function isObject(json) {
  try {
    const value = JSON.parse(json || "{}");
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}
