// The list of conversations: a column beside the chat, or a panel over it where the screen is narrow.

import { at, button, make, setChildren } from "./dom.js";
import { titleOf } from "./conversations.js";

const side = at("side");
const toggle = at("toggle-side");
const isNarrow = matchMedia("(max-width: 64rem)");
const rows = new Map(); // id -> the row's elements

// Shows the conversations, the latest first. `actions` has `rename`, `exportAs` and `remove`.
export function drawSide(conversations, current, actions) {
  const sorted = [...conversations.values()].sort((a, b) => b.updated - a.updated);
  for (const id of rows.keys()) if (!conversations.has(id)) rows.delete(id);
  const nodes = sorted.map((conversation) => {
    if (!rows.has(conversation.id)) rows.set(conversation.id, newRow(conversation.id, conversations, actions));
    const { node, link, summary } = rows.get(conversation.id);
    const title = titleOf(conversation);
    link.textContent = title;
    summary.setAttribute("aria-label", `Actions for ${title}`);
    if (conversation === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    return node;
  });
  setChildren(at("list"), nodes);
}

function newRow(id, conversations, actions) {
  const link = make("a", { href: `#${id}`, dir: "auto", on: closeSide });
  const summary = make("summary", { text: "⋯" });
  const choose = (words, act) => button(words, () => {
    menu.open = false;
    act(conversations.get(id));
  });
  const menu = make(
    "details",
    { name: "conversation-actions" },
    summary,
    make(
      "div",
      {},
      choose("Rename", () => rename(id, conversations, actions)),
      choose("Save as Markdown", (conversation) => actions.exportAs(conversation, "md")),
      choose("Save as JSON", (conversation) => actions.exportAs(conversation, "json")),
      choose("Delete", (conversation) => {
        closeSide();
        actions.remove(conversation);
      }),
    ),
  );
  return { node: make("li", {}, link, menu), link, summary };
}

function rename(id, conversations, actions) {
  const { link, summary } = rows.get(id);
  const input = make("input", { "aria-label": "Title of the conversation", maxlength: "200", dir: "auto" });
  input.value = titleOf(conversations.get(id));
  link.hidden = true;
  link.before(input);
  input.select();
  const end = (isKept) => {
    if (!input.isConnected) return;
    const title = input.value.trim();
    input.onblur = null;
    input.remove();
    link.hidden = false;
    if (isKept && conversations.has(id)) actions.rename(conversations.get(id), title);
  };
  input.onblur = () => end(true);
  input.onkeydown = (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation(); // Escape also stops an answer
    end(event.key === "Enter");
    summary.focus();
  };
}

function closeSide() {
  if (isNarrow.matches) side.hidePopover();
}

function showOpen() {
  const isOpen = isNarrow.matches ? side.matches(":popover-open") : !side.hidden;
  toggle.setAttribute("aria-expanded", isOpen);
  document.body.classList.toggle("with-side", !isNarrow.matches && isOpen);
}

function arrange() {
  side.popover = isNarrow.matches ? "auto" : null;
  side.hidden = false;
  showOpen();
}

export function prepareSide() {
  isNarrow.addEventListener("change", arrange);
  side.addEventListener("toggle", showOpen);
  toggle.addEventListener("click", () => {
    if (isNarrow.matches) side.togglePopover();
    else side.hidden = !side.hidden;
    showOpen();
  });
  arrange();
}
