// The chat page. One turn is what a person wrote and what the model answered; a conversation is a
// list of turns. Everything that is shown follows from `current`, the open conversation.

import { announce, at, button, copyText, download, make, setChildren } from "./dom.js";
import { contextUse, turnsToLeaveOut } from "./context.js";
import * as store from "./conversations.js";
import { grow, openEditor } from "./editor.js";
import { showMarkdown } from "./markdown.js";
import { followAnswer, keepUp } from "./scroll.js";
import { Problem, call, eventsOf } from "./server.js";
import { defaultSystem, hasInvalidSettings, prepareSettings, prepareTheme, samplingFields } from "./settings.js";
import { drawSide, prepareSide } from "./side.js";
import { local, session } from "./storage.js";

const turnsNode = at("turns");
const text = at("text");
const send = at("send");

let info = null; // what the server says about its model: { name, chat, context }
let current = null; // the open conversation
const conversations = new Map(); // id -> conversation, without those that have no turn yet
const running = new Map(); // conversation -> the AbortController of the answer being written
let views = new WeakMap(); // turn -> its elements
const refused = new WeakSet(); // turns that did not fit the context

const isChat = () => info?.chat ?? true;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// Conversations

function openFromAddress() {
  const id = location.hash.slice(1);
  current = conversations.get(id) ?? store.newConversation(defaultSystem());
  if (id && !conversations.has(id)) history.replaceState(null, "", location.pathname);
  at("system").value = current.system;
  followAnswer();
  draw();
  focusMessage();
}

function focusMessage() {
  if (matchMedia("(pointer: fine)").matches) text.focus(); // elsewhere a keyboard would open
}

function openConversation(id) {
  if (location.hash.slice(1) !== id) history.pushState(null, "", id ? `#${id}` : location.pathname);
  openFromAddress();
}

// Keeps and shows a conversation that has been changed.
function changed(conversation) {
  keep(conversation);
  if (conversation === current) {
    if (location.hash.slice(1) !== current.id) history.replaceState(null, "", `#${current.id}`);
    draw();
  } else {
    drawList();
  }
}

function keep(conversation) {
  conversations.set(conversation.id, conversation);
  showStorageProblem(store.save(conversation) ? "" : "The browser has no more room: this conversation ends with the page. Save it as a file, or delete others.");
}

function showStorageProblem(words) {
  at("storage-problem").textContent = words;
  at("storage-problem").hidden = !words;
}

const listActions = {
  rename(conversation, title) {
    conversation.title = title;
    changed(conversation);
  },
  exportAs(conversation, kind) {
    const name = store.titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation";
    if (kind === "json") download(`${name}.json`, "application/json", store.toJSON(conversation));
    else download(`${name}.md`, "text/markdown", store.toMarkdown(conversation, info?.name ?? "Model"));
  },
  remove(conversation) {
    stop(conversation);
    running.delete(conversation);
    conversations.delete(conversation.id);
    store.remove(conversation);
    if (conversation === current) openConversation("");
    offerUndo(`Deleted “${store.titleOf(conversation)}”.`, () => {
      keep(conversation);
      openConversation(conversation.id);
    });
    drawList();
    at("undo-button").focus();
  },
};

function drawList() {
  drawSide(conversations, current, listActions);
  document.title = current.turns.length ? `${store.titleOf(current)} – ${info?.name ?? "Chat"}` : (info?.name ?? "Chat");
}

async function importFile(file) {
  try {
    const conversation = store.fromJSON(await file.text());
    keep(conversation);
    openConversation(conversation.id);
    announce("Imported.");
  } catch (error) {
    showStorageProblem(`${file.name} cannot be imported: ${error.message}.`);
  }
}

// Undo

let undo = null; // what the Undo button does

function offerUndo(words, action) {
  undo = action;
  at("undo-text").textContent = words;
  at("undo").hidden = !words;
}

function undoable(words, conversation) {
  const { leftOut } = conversation;
  const turns = structuredClone(conversation.turns);
  offerUndo(words, () => {
    stop(conversation);
    running.delete(conversation);
    Object.assign(conversation, { turns, leftOut });
    changed(conversation);
    if (conversation !== current) openConversation(conversation.id);
  });
}

// Answers

function request({ system, leftOut, turns }, turn) {
  const body = { model: info.name, stream: true, stream_options: { include_usage: true }, ...samplingFields() };
  if (!info.chat) {
    body.max_tokens ??= defaultLength();
    return ["v1/completions", { ...body, prompt: turn.user }];
  }
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const each of turns.slice(leftOut)) {
    if (each !== turn && !each.answer) continue; // the model only reads turns that it has answered
    messages.push({ role: "user", content: each.user });
    if (each === turn) break;
    messages.push({ role: "assistant", content: each.answer });
  }
  return ["v1/chat/completions", { ...body, messages }];
}

// How many tokens a model that only continues texts writes at once.
const defaultLength = () => Math.max(1, Math.min(200, Math.floor(info.context / 2)));

async function write(conversation, turn) {
  const controller = new AbortController();
  running.set(conversation, controller);
  Object.assign(turn, store.newTurn(turn.user));
  Object.assign(viewOf(turn), { spoken: 0, start: null, rate: "" });
  at("spoken").replaceChildren();
  refused.delete(turn);
  followAnswer();
  conversation.updated = Date.now();
  changed(conversation);
  announce(`${info.name} is writing.`);
  try {
    const [path, body] = request(conversation, turn);
    const response = await call(path, { method: "POST", body: JSON.stringify(body), signal: controller.signal });
    for await (const event of eventsOf(response.body)) receive(event, turn, conversation);
    if (!turn.answer) turn.note ||= "The answer is empty.";
  } catch (error) {
    if (controller.signal.aborted) turn.note = "Stopped.";
    else turn.problem = error instanceof Problem ? error.message : "The connection was lost before the answer was finished.";
    if (error.isFull) refused.add(turn);
  }
  if (running.get(conversation) !== controller) return; // it was undone or deleted
  running.delete(conversation);
  changed(conversation);
  if (conversation !== current) return;
  speak(turn, true);
  if (!turn.problem) announce(turn.note || `${info.name} has finished.`);
}

function receive({ choices: [choice], usage }, turn, conversation) {
  const added = choice?.text ?? choice?.delta?.content ?? "";
  if (added) {
    viewOf(turn).start ??= performance.now();
    turn.answer += added;
    if (conversation === current) drawSoon(turn);
  }
  if (choice?.finish_reason === "length") turn.note = "Ended at the maximum number of tokens.";
  if (!usage) return;
  turn.tokens = usage.completion_tokens;
  turn.total = usage.total_tokens;
  if (turn.total >= info.context) turn.note = "The context is full: the answer ends here.";
  const seconds = (performance.now() - viewOf(turn).start) / 1000;
  const rate = (turn.tokens - 1) / seconds;
  // Tokens come in groups, so the rate of a short answer says nothing.
  viewOf(turn).rate = seconds > 0.5 ? `, ${rate.toFixed(rate < 10 ? 1 : 0)} a second` : "";
}

function stop(conversation) {
  running.get(conversation)?.abort();
}

function submit() {
  if (running.has(current) || !info || !text.value.trim() || hasInvalidSettings()) return;
  const turn = store.newTurn(text.value);
  current.turns.push(turn);
  text.value = "";
  offerUndo("");
  fit();
  write(current, turn);
}

// Asks again at a turn, with its text or another; later turns are removed. Returns false if the page
// cannot ask now.
function resend(turn, user = turn.user) {
  if (running.has(current) || !info || hasInvalidSettings()) return false;
  const index = current.turns.indexOf(turn);
  const later = current.turns.length - index - 1;
  const lost = [turn.answer && "The earlier answer was replaced", later && `${plural(later, "later turn")} removed`];
  if (turn.answer || later) undoable(`${lost.filter(Boolean).join(", ")}.`, current);
  current.turns = current.turns.slice(0, index + 1);
  current.leftOut = Math.min(current.leftOut, index);
  turn.user = user;
  write(current, turn);
}

function continueText(turn) {
  turn.user += turn.answer;
  write(current, turn);
}

function changeAnswer(turn, answer) {
  if (answer === turn.answer) return;
  undoable("The answer was changed.", current);
  Object.assign(turn, { answer, note: "Edited.", problem: "", tokens: 0 });
  forgetTotals(current.turns.indexOf(turn));
  changed(current);
}

// Context

function forgetTotals(from = 0) {
  for (const turn of current.turns.slice(from)) turn.total = 0;
}

const used = () => contextUse(current, text.value, isChat());

function leaveOut(count) {
  undoable(count > 0 ? `The model no longer reads the ${plural(count, "oldest turn")}.` : "The model reads all turns again.", current);
  current.leftOut = Math.max(0, current.leftOut + count);
  forgetTotals();
  changed(current);
}

const leaveOutLabel = (count) => `Leave out ${count === 1 ? "the oldest turn" : `the ${count} oldest turns`}`;

function drawContext() {
  const { tokens, isExact } = used();
  at("context").hidden = !info || !tokens;
  if (at("context").hidden) return;
  const bar = at("context-bar");
  const share = Math.min(1, tokens / info.context);
  const words = `${isExact ? "" : "about "}${tokens.toLocaleString("en")} of ${info.context.toLocaleString("en")} tokens`;
  bar.firstElementChild.style.width = `${100 * share}%`;
  bar.setAttribute("aria-valuemax", info.context);
  bar.setAttribute("aria-valuenow", Math.min(tokens, info.context));
  bar.setAttribute("aria-valuetext", words);
  at("context").classList.toggle("nearly-full", share >= 0.85);
  at("context-text").textContent = words;
  const count = share >= 0.85 && isChat() && !running.has(current) ? turnsToLeaveOut(current, tokens, info.context) : 0;
  at("trim").hidden = !count;
  at("trim").textContent = leaveOutLabel(count);
  at("trim").onclick = () => leaveOut(count);
}

// Drawing

let frame = 0;
let earliest = 0; // the time before which nothing is drawn

// Draws an answer once a frame at most, and less often if that takes long.
function drawSoon(turn) {
  frame ||= requestAnimationFrame((start) => {
    frame = 0;
    if (!current.turns.includes(turn) || !running.has(current)) return;
    if (start < earliest) return drawSoon(turn);
    drawTurn(turn);
    speak(turn, false);
    drawContext();
    keepUp();
    earliest = start + 4 * (performance.now() - start);
  });
}

const leftOutNote = make("div", { class: "left-out-note" }, make("span"), button("Read them again", () => leaveOut(-current.leftOut)));

function draw() {
  const { turns, leftOut } = current;
  const nodes = turns.map((turn) => viewOf(turn).node);
  if (leftOut) nodes.splice(leftOut, 0, leftOutNote);
  leftOutNote.firstElementChild.textContent = `The model does not read the ${plural(leftOut, "turn")} above.`;
  setChildren(turnsNode, nodes);
  turns.forEach(drawTurn);
  at("welcome").hidden = Boolean(info) && turns.length > 0;
  drawControls();
  drawList();
  keepUp();
}

function drawControls() {
  const stops = running.has(current);
  turnsNode.toggleAttribute("data-running", stops);
  send.toggleAttribute("data-stops", stops);
  send.setAttribute("aria-label", stops ? "Stop" : "Send");
  send.disabled = !stops && (!info || !text.value.trim());
  drawContext();
}

function viewOf(turn) {
  if (views.has(turn)) return views.get(turn);
  const view = {
    user: make("div", { class: "user", dir: "auto" }),
    editUser: button("Edit", () => edit(turn, "user"), { class: "quiet edit-user", "aria-label": "Edit the message" }),
    answer: make("div", { class: "answer", dir: "auto" }),
    note: make("p", { class: "note" }),
    problem: make("p", { class: "problem", role: "alert" }),
    actions: make("div", { class: "actions" }),
    spoken: 0, // blocks of the answer that were read out
    start: null, // when its first text came
    rate: "", // how fast it was written
  };
  const heading = (words) => make("h2", { class: "unseen", text: words });
  view.node = make("article", { class: "turn" }, heading("You"), make("div", { class: "from-user" }, view.editUser, view.user), heading(info?.name ?? "Model"), view.answer, view.note, view.problem, view.actions);
  views.set(turn, view);
  return view;
}

function drawTurn(turn) {
  const view = viewOf(turn);
  const index = current.turns.indexOf(turn);
  const isLast = index === current.turns.length - 1;
  const isWriting = isLast && running.has(current);
  if (view.user.textContent !== turn.user) view.user.textContent = turn.user;
  if (view.shown !== turn.answer) {
    if (isChat()) view.blocks = showMarkdown(view.answer, turn.answer);
    else view.answer.textContent = turn.answer;
    view.shown = turn.answer;
  }
  view.caret?.classList.remove("writing");
  view.caret = isWriting ? lastElement(view.answer) : null;
  view.caret?.classList.add("writing");
  view.node.classList.toggle("left-out", index < current.leftOut);
  view.node.classList.toggle("last", isLast);
  for (const part of ["note", "problem"]) {
    view[part].hidden = !turn[part];
    if (view[part].textContent !== turn[part]) view[part].textContent = turn[part];
  }
  const state = [isWriting, isLast, Boolean(turn.answer), turn.problem, turn.tokens, current.leftOut].join();
  if (view.state === state) return;
  view.state = state;
  if (view.node.contains(document.activeElement) && isWriting) send.focus(); // the button that had it disappears
  view.actions.replaceChildren(...(isWriting ? [] : answerActions(turn, isLast, view.rate)));
}

function lastElement(node) {
  const block = node.lastElementChild;
  return block?.querySelector("pre code, li:last-child, td:last-child") ?? block ?? node;
}

function answerActions(turn, isLast, rate) {
  const whole = () => (isChat() ? "" : turn.user) + turn.answer;
  const nodes = [];
  if (turn.answer) nodes.push(button("Copy", (event) => copyText(whole(), event.target), { "aria-label": "Copy the answer" }));
  if (!isChat()) nodes.push(button("Edit the text", () => edit(turn, "user")));
  if (turn.answer && isChat()) nodes.push(button("Edit", () => edit(turn, "answer"), { "aria-label": "Edit the answer" }));
  nodes.push(button(turn.problem ? "Try again" : "Regenerate", () => resend(turn), { class: "quiet when-idle" }));
  if (isLast && !isChat() && turn.answer) nodes.push(button("Continue", () => continueText(turn), { class: "quiet when-idle" }));
  const count = isLast && refused.has(turn) ? turnsToLeaveOut(current, Math.max(info.context, used().tokens), info.context) : 0;
  if (count) {
    nodes.push(button(`${leaveOutLabel(count)} and try again`, () => {
      leaveOut(count);
      write(current, turn);
    }, { class: "quiet when-idle" }));
  }
  if (turn.tokens) nodes.push(make("span", { class: "count", text: plural(turn.tokens, "token") }, make("span", { class: "rate", text: rate })));
  return nodes;
}

function edit(turn, part) {
  const isUser = part === "user";
  openEditor(viewOf(turn)[part], turn[part], {
    label: isUser ? "Message" : "Answer, in Markdown",
    action: isUser ? "Send" : "Save",
    isSentByEnter: isUser,
    onDone: (words) => (isUser ? resend(turn, words) : changeAnswer(turn, words)),
    onClose: focusMessage,
  });
}

// Reads out the blocks of an answer that are complete.
function speak(turn, isDone) {
  const view = viewOf(turn);
  if (!isChat()) return isDone && at("spoken").append(make("p", { text: turn.answer }));
  const ready = view.blocks.length - (isDone ? 0 : 1);
  for (; view.spoken < ready; view.spoken++) {
    const { node } = view.blocks[view.spoken];
    const isCode = node.className === "code";
    at("spoken").append(make("p", { text: isCode ? "Code." : node.textContent }));
  }
}

// What a person does

function fit() {
  grow(text);
  session.set("draft", text.value);
  drawControls();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.has(current)) stop(current);
  else submit();
});
text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) stop(current);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the conversation
  text.focus();
});
at("new").addEventListener("click", () => {
  openConversation("");
  announce("New conversation.");
});
at("undo-button").addEventListener("click", () => {
  undo?.();
  offerUndo("");
  focusMessage();
});
at("undo-dismiss").addEventListener("click", () => {
  offerUndo("");
  focusMessage();
});
at("import").addEventListener("click", () => at("import-file").click());
at("import-file").addEventListener("change", async () => {
  await importFile(at("import-file").files[0]);
  at("import-file").value = "";
});
addEventListener("hashchange", openFromAddress);
addEventListener("storage", ({ key, newValue }) => { // another tab has changed a conversation
  if (!store.isConversationKey(key)) return;
  const id = store.idOfKey(key);
  const before = conversations.get(id);
  if (before && running.has(before)) return;
  const conversation = newValue && store.load(key);
  if (!conversation) conversations.delete(id);
  else conversations.set(id, conversation);
  if (conversation && current.id === id) current = conversation;
  draw();
});
addEventListener("pagehide", () => {
  for (const conversation of running.keys()) {
    conversation.turns.at(-1).note = "Stopped when the page was closed.";
    store.save(conversation);
    stop(conversation);
    running.delete(conversation);
  }
});
addEventListener("pageshow", draw); // also when the browser brings a closed page back

// Start

function welcome(big, ...small) {
  at("welcome").firstElementChild.textContent = big;
  at("welcome").lastElementChild.replaceChildren(...small);
}

async function connect() {
  try {
    info = await (await call("info")).json();
  } catch (error) {
    if (error.isTemporary) {
      welcome("The server is not ready yet", "This page tries again by itself.");
      setTimeout(connect, 1000);
    } else {
      const words = error instanceof Problem ? error.message : "The connection was lost.";
      welcome("No answer from the server", words, " ", button("Try again", connect));
    }
    return;
  }
  const tokens = info.context.toLocaleString("en");
  at("name").textContent = info.name;
  document.body.classList.toggle("continues-text", !info.chat);
  if (info.chat) {
    welcome("What shall we talk about?", `The model reads up to ${tokens} tokens of a conversation.`);
  } else {
    welcome("Begin a text", `This model has not been trained on conversations: it continues your text, up to ${tokens} tokens in all.`);
    at("hint").textContent = at("hint").textContent.replace("sends", "continues the text");
  }
  at("system-field").hidden = !info.chat;
  views = new WeakMap(); // what was drawn before the model was known
  at("max_tokens").placeholder = info.chat ? "What fits" : String(defaultLength());
  text.placeholder = at("text-label").textContent = info.chat ? `Message to ${info.name}` : "Text to continue";
  draw();
}

prepareTheme();
prepareSide();
prepareSettings((system) => {
  if (system === current.system) return;
  current.system = system;
  forgetTotals();
  if (current.turns.length) changed(current);
});
const { conversations: kept, damaged } = store.loadAll();
for (const conversation of kept) conversations.set(conversation.id, conversation);
at("kept").textContent = local.isOn ? "Kept in this browser only." : "This browser keeps nothing: conversations end with the page.";
if (damaged) at("kept").textContent += ` ${plural(damaged, "conversation")} could not be read.`;
text.value = session.get("draft") ?? "";
grow(text);
openFromAddress();
connect();
