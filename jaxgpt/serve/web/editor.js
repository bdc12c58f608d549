// Fields that grow with their text, and the one that a message is edited in.

import { make } from "./dom.js";

export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

// Opens a field with `text` in place of the element `shown`. `onDone` gets the edited text, and returns
// false to keep the field open; `onClose` is called when it has been closed.
export function openEditor(shown, text, { label, action, isSentByEnter, onDone, onClose }) {
  if (shown.hidden) return; // it is open already
  const area = make("textarea", { "aria-label": label, dir: "auto" });
  area.value = text;
  const close = () => {
    form.remove();
    shown.hidden = false;
    onClose();
  };
  const cancel = make("button", { type: "button", text: "Cancel", on: close });
  const done = make("button", { class: "main", type: "submit", text: action });
  const form = make("form", { class: "editor" }, area, make("div", { class: "end" }, cancel, done));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim() && onDone(area.value) !== false) close();
  });
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation(); // it also stops an answer
      close();
    } else if (event.key === "Enter" && !event.isComposing && (isSentByEnter ? !event.shiftKey : event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  shown.hidden = true;
  shown.before(form);
  grow(area);
  area.focus();
}
