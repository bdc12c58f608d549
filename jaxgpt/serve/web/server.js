// Calls of the server: its API key, its errors in plain words, and its streams of events.

import { at } from "./dom.js";
import { session } from "./storage.js";

// An error whose message is for the person. `isFull`: the conversation does not fit the context;
// `isTemporary`: the server is starting or stopping.
export class Problem extends Error {
  constructor(message, { isFull = false, isTemporary = false } = {}) {
    super(message);
    Object.assign(this, { isFull, isTemporary });
  }
}

let apiKey = session.get("key") ?? "";

function askKey(isWrong) {
  const dialog = at("key");
  at("key-problem").hidden = !isWrong;
  at("key-text").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onsubmit = (event) => {
      event.preventDefault();
      apiKey = at("key-text").value;
      session.set("key", apiKey);
      dialog.onclose = null;
      dialog.close();
      resolve();
    };
    dialog.onclose = () => reject(new Problem("This server answers only with its API key."));
  });
}

export async function call(path, options = {}) {
  for (;;) {
    const key = apiKey;
    const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached. It may have been stopped, or the network is down.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (apiKey === key) apiKey = "";
      await askKey(Boolean(key));
      continue;
    }
    const body = await response.json().catch(() => ({}));
    throw problem(response.status, body.error ?? {}, response.headers.get("retry-after"));
  }
}

function problem(status, error, seconds) {
  const again = seconds ? `Try again in ${seconds} seconds.` : "Try again in a moment.";
  if (error.code === "context_length_exceeded") {
    return /max_/.test(error.param)
      ? new Problem("After this conversation the context has no room for so many tokens. Lower Max tokens in the settings, or make room.", { isFull: true })
      : new Problem("The context is full: the conversation and an answer do not fit. Make room, or shorten the message.", { isFull: true });
  }
  if (status === 429) return new Problem(`The server is busy: others are being answered. ${again}`);
  if (error.code === "deadline_exceeded") return new Problem("The answer took too long, and the server ended it.");
  if (status === 503) return new Problem(`The server is stopping, or not ready yet. ${again}`, { isTemporary: true });
  if (status === 413) return new Problem("That is more text than the server takes at once. Shorten it.");
  if (status >= 500) return new Problem("Something went wrong on the server. Its log says what.");
  return new Problem(error.message ? `The server did not accept this: ${error.message}` : `The server answered ${status}.`);
}

// The events of an answer, parsed, up to its end; a Problem if the server says that it failed.
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem("The connection was lost before the answer was finished.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (!part.startsWith("data: ")) continue; // a comment that keeps the connection open
      const event = JSON.parse(part.slice(6));
      if (event.error) throw problem(500, event.error);
      yield event;
    }
  }
}
