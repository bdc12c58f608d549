// The settings dialog and the color theme, both kept in the browser's local storage.

import { at } from "./dom.js";
import { local } from "./storage.js";

const KEY = "jaxgpt.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const dialog = at("settings");
let newSystem = ""; // the system prompt that new conversations start with

// The sampling fields of a request.
export function samplingFields() {
  const filled = NUMBERS.filter((name) => at(name).value !== "");
  return Object.fromEntries(filled.map((name) => [name, Number(at(name).value)]));
}

// Opens the dialog at the first field that is invalid, if there is one.
export function hasInvalidSettings() {
  const wrong = NUMBERS.map(at).find((input) => !input.checkValidity());
  const label = wrong && dialog.querySelector(`label[for="${wrong.id}"]`).textContent;
  const problem = at("settings-problem");
  problem.hidden = !wrong;
  problem.textContent = wrong ? `${label}: a whole number from ${wrong.min} to ${wrong.max}, or nothing.` : "";
  if (wrong) {
    if (!dialog.open) dialog.showModal();
    wrong.focus();
  }
  return Boolean(wrong);
}

function showValues() {
  for (const output of dialog.querySelectorAll("output")) {
    output.textContent = Number(at(output.htmlFor.value).value).toFixed(2);
  }
}

function read() {
  try {
    const kept = JSON.parse(local.get(KEY));
    return kept && typeof kept === "object" ? kept : {};
  } catch {
    return {};
  }
}

function keep() {
  const valid = NUMBERS.filter((name) => at(name).checkValidity());
  const values = Object.fromEntries(valid.map((name) => [name, at(name).value]));
  local.set(KEY, JSON.stringify({ ...values, system: newSystem }));
}

export const defaultSystem = () => newSystem;

// `onSystem` is called with the system prompt whenever a person has changed it.
export function prepareSettings(onSystem) {
  const kept = read();
  if (typeof kept.system === "string") newSystem = kept.system;
  for (const input of NUMBERS.map(at)) {
    const value = kept[input.id] ?? input.defaultValue;
    input.value = value;
    if (input.value !== value || !input.checkValidity()) input.value = input.defaultValue;
  }
  showValues();
  const useSystem = () => {
    newSystem = at("system").value;
    onSystem(newSystem);
  };
  dialog.addEventListener("input", (event) => {
    if (event.target === at("system")) useSystem();
    showValues();
    keep();
  });
  dialog.addEventListener("reset", () => setTimeout(() => { // when the fields have been reset
    useSystem();
    showValues();
    keep();
    at("settings-problem").hidden = true;
  }));
  dialog.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!hasInvalidSettings()) dialog.close();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  at("open-settings").addEventListener("click", () => dialog.showModal());
}

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

function setTheme(chosen) {
  const root = document.documentElement;
  if (["light", "dark"].includes(chosen)) root.dataset.theme = chosen;
  const isDark = (root.dataset.theme ?? (darkSystem.matches ? "dark" : "light")) === "dark";
  const label = `Use the ${isDark ? "light" : "dark"} theme`;
  at("theme").setAttribute("aria-label", label);
  at("theme").title = label;
  return isDark;
}

export function prepareTheme() {
  setTheme(local.get("theme"));
  at("theme").addEventListener("click", () => {
    const chosen = setTheme() ? "light" : "dark";
    setTheme(chosen);
    local.set("theme", chosen);
  });
  darkSystem.addEventListener("change", () => setTheme());
}
