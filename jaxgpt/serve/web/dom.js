// Small helpers for the document. Text only ever goes into text nodes.

export const at = (id) => document.getElementById(id);

export function make(tag, { text = "", on, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  if (on) node.addEventListener("click", on);
  node.append(...children);
  return node;
}

// Makes these nodes the children, and moves none that is in its place: moving takes the focus away.
export function setChildren(parent, nodes) {
  for (const child of [...parent.children]) if (!nodes.includes(child)) child.remove();
  nodes.forEach((node, index) => {
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
}

// A button of the kind that stands in rows under messages.
export function button(text, on, attributes = {}) {
  return make("button", { class: "quiet", type: "button", text, on, ...attributes });
}

// Tells a screen reader.
export function announce(words) {
  at("status").textContent = words;
}

export async function copyText(words, pressed) {
  try {
    await navigator.clipboard.writeText(words);
  } catch { // browsers offer the clipboard only over https and on localhost
    const area = make("textarea", { class: "unseen" });
    area.value = words;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    pressed.focus();
  }
  pressed.textContent = "Copied";
  announce("Copied.");
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
}

export function download(name, type, content) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
