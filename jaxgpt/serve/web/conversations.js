// Conversations in the browser's local storage, one key for each. What is read back is checked like
// any input, since other programs and earlier versions of this page can have written it.
//
// A conversation: { id, title, system, leftOut, updated, turns }. `title` is "" until it is renamed,
// and its first `leftOut` turns are shown, but not sent to the model.
// A turn: { user, answer, note, problem, tokens, total }. `tokens` counts the answer, and `total`
// all that the model had read and written after it; 0 where the server has not counted.

import { local } from "./storage.js";

const PREFIX = "jaxgpt.conversation.";
const ID = /^[a-z0-9]{16}$/;
const TITLE = 80; // characters

export function newConversation(system = "") {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const id = Array.from(bytes, (byte) => (byte % 36).toString(36)).join("");
  return { id, title: "", system, leftOut: 0, updated: Date.now(), turns: [] };
}

export function newTurn(user) {
  return { user, answer: "", note: "", problem: "", tokens: 0, total: 0 };
}

export function titleOf({ title, turns }) {
  const text = title || (turns[0]?.user ?? "").trim().split("\n")[0] || "New conversation";
  return text.length > TITLE ? `${text.slice(0, TITLE - 1)}…` : text;
}

// Returns the conversations, and how many entries could not be read; those are left as they are.
export function loadAll() {
  const conversations = [];
  let damaged = 0;
  for (const key of local.keys()) {
    if (!key.startsWith(PREFIX)) continue;
    const conversation = load(key);
    if (conversation) conversations.push(conversation);
    else damaged++;
  }
  return { conversations, damaged };
}

// The conversation under a key of the storage; null if there is none that can be read.
export function load(key) {
  try {
    const conversation = checked(JSON.parse(local.get(key)));
    return key === PREFIX + conversation.id ? conversation : null;
  } catch {
    return null;
  }
}

export function isConversationKey(key) {
  return key?.startsWith(PREFIX) && ID.test(key.slice(PREFIX.length));
}

export const idOfKey = (key) => key.slice(PREFIX.length);

// Returns false if the browser has no room for it.
export function save(conversation) {
  return local.set(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function remove(conversation) {
  local.remove(PREFIX + conversation.id);
}

function checked({ id, title, system, leftOut, updated, turns }) {
  const conversation = {
    id: text(id),
    title: text(title),
    system: text(system),
    leftOut: count(leftOut),
    updated: count(updated),
    turns: turns.map(({ user, answer, note, problem, tokens, total }) => ({
      user: text(user),
      answer: text(answer),
      note: text(note),
      problem: text(problem),
      tokens: count(tokens),
      total: count(total),
    })),
  };
  if (!ID.test(id) || leftOut > turns.length) throw new TypeError("not a conversation");
  return conversation;
}

function text(value) {
  if (typeof value !== "string") throw new TypeError("not a text");
  return value;
}

function count(value) {
  if (!Number.isSafeInteger(value) || value < 0) throw new TypeError("not a count");
  return value;
}

// Files

// A title and messages in the format of OpenAI's API.
export function toJSON(conversation) {
  const messages = conversation.turns.flatMap(({ user, answer }) => [
    { role: "user", content: user },
    ...(answer ? [{ role: "assistant", content: answer }] : []),
  ]);
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  return `${JSON.stringify({ title: titleOf(conversation), messages }, null, 2)}\n`;
}

export function toMarkdown(conversation, name) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.system) parts.push("## System prompt", conversation.system);
  for (const { user, answer } of conversation.turns) {
    parts.push("## You", user);
    if (answer) parts.push(`## ${name}`, answer);
  }
  return `${parts.join("\n\n")}\n`;
}

// The conversation of a file that `toJSON` wrote; an Error says what is wrong with others.
export function fromJSON(content) {
  let messages, title;
  try {
    ({ messages, title = "" } = JSON.parse(content));
  } catch {
    throw new Error("the file is not JSON");
  }
  const isMessage = (message) => typeof message?.content === "string" && ["system", "user", "assistant"].includes(message.role);
  if (!Array.isArray(messages) || !messages.every(isMessage) || typeof title !== "string") {
    throw new Error('the file needs "messages", a list of {"role": "user", "content": "..."}');
  }
  const conversation = newConversation();
  conversation.title = title;
  for (const [index, { role, content }] of messages.entries()) {
    const last = conversation.turns.at(-1);
    if (role === "system" && index === 0) conversation.system = content;
    else if (role === "user") conversation.turns.push(newTurn(content));
    else if (role === "assistant" && last && !last.answer) last.answer = content;
    else throw new Error(`message ${index + 1} of the file is the ${role}'s: only the first can be the system's, and each of the assistant's follows one of the user's`);
  }
  if (!conversation.turns.length) throw new Error("the file has no message of a user");
  return conversation;
}
