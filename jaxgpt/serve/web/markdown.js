// Markdown to elements. marked parses the text to a tree of tokens and Prism parses code; every
// element is then made here, from a fixed list of tags, and all text goes into text nodes. HTML in
// the text is shown as it was written.

import { Marked } from "./vendor/marked.js";
import { button, copyText, make } from "./dom.js";

const DEEPEST = 32; // levels of nesting; what is nested deeper is shown as plain text
const LONGEST = 10_000; // characters of code that are highlighted
const SCHEMES = ["http:", "https:", "mailto:"];
const LANGUAGES = { "c++": "cpp", console: "bash", jsonl: "json", jsx: "javascript", python3: "python", tsx: "typescript", zsh: "bash" };

// Mathematics stays as it was written: its backslashes, underscores and stars are not Markdown.
const mathBlock = {
  name: "mathBlock",
  level: "block",
  start: (text) => /(?:^|\n)(?:\$\$|\\\[|\\begin\{)/.exec(text)?.index,
  tokenizer(text) {
    const found = /^(?:\$\$[^$]+\$\$|\\\[[^]+?\\\]|\\begin\{(\w+\*?)\}[^]+?\\end\{\1\})[ \t]*(?:\n+|$)/.exec(text);
    return found ? { type: "mathBlock", raw: found[0] } : undefined;
  },
};
const mathInline = {
  name: "math",
  level: "inline",
  start: (text) => /\$|\\[([]/.exec(text)?.index,
  tokenizer(text) {
    // As in Pandoc, "$5 and $10" are prices: a formula has no space inside its dollar signs.
    const found = /^(?:\$\$[^$]+\$\$|\\\([^]+?\\\)|\\\[[^]+?\\\]|\$(?!\s)(?:\\.|[^$\\\n])+(?<!\s)\$(?!\d))/.exec(text);
    return found ? { type: "math", raw: found[0] } : undefined;
  },
};

const marked = new Marked({
  gfm: true,
  extensions: [mathBlock, mathInline],
  tokenizer: {
    html: () => undefined, // Markdown inside of <think> and the like is still Markdown
    del: (text) => (text.startsWith("~~") ? false : undefined), // "~5" means about 5
  },
});

const drawn = new WeakMap(); // element -> the blocks that it shows

// Makes `node` show the text. Blocks that have not changed keep their elements, and with them
// selections and scroll positions. Returns the blocks: [{ raw, node }].
export function showMarkdown(node, text) {
  const before = drawn.get(node) ?? [];
  const { blocks, defines } = parse(text);
  let same = 0;
  while (!defines && before[same]?.raw === blocks[same]?.raw && same < blocks.length) same++;
  for (const block of before.slice(same)) block.node.remove();
  for (let index = 0; index < blocks.length; index++) {
    if (index < same) blocks[index] = before[index];
    else node.append((blocks[index].node = safely(blocks[index].token)));
  }
  drawn.set(node, blocks);
  return blocks;
}

function parse(text) {
  let tokens;
  try {
    tokens = marked.lexer(text);
  } catch { // nested too deep for the parser
    tokens = [{ type: "plain", raw: text }];
  }
  const blocks = tokens.filter((token) => !["space", "def"].includes(token.type)).map((token) => ({ raw: token.raw, token }));
  // A definition of a link may change blocks before it.
  return { blocks, defines: tokens.some((token) => token.type === "def") };
}

function safely(token) {
  try {
    return block(token, 0);
  } catch {
    return make("p", { text: token.raw });
  }
}

const blocksOf = (tokens, depth) => tokens.filter((token) => token.type !== "space").map((token) => block(token, depth + 1));

function block(token, depth) {
  if (depth > DEEPEST) return make("p", { text: token.raw });
  switch (token.type) {
    case "paragraph":
      return make("p", {}, ...inline(token.tokens, depth));
    case "text": // of a list's item
      return make("span", {}, ...(token.tokens ? inline(token.tokens, depth) : [token.text]));
    case "heading": // the page's own headings are of levels 1 and 2
      return make(`h${Math.min(6, token.depth + 2)}`, {}, ...inline(token.tokens, depth));
    case "list":
      return make(token.ordered ? "ol" : "ul", token.ordered ? { start: token.start } : {}, ...token.items.map((item) => listItem(item, depth)));
    case "blockquote":
      return make("blockquote", {}, ...blocksOf(token.tokens, depth));
    case "table":
      return table(token, depth);
    case "code":
      return code(token);
    case "hr":
      return make("hr");
    case "mathBlock":
      return make("div", { class: "math", tabindex: "0", role: "group", "aria-label": "Formula", text: token.raw.trim() });
    default:
      return make("p", { text: token.raw });
  }
}

function listItem(item, depth) {
  const node = make("li", item.task ? { class: "task" } : {});
  for (const token of item.tokens) {
    if (token.type === "checkbox") {
      const box = make("input", { type: "checkbox", disabled: "", "aria-label": token.checked ? "Done" : "To do" });
      box.checked = token.checked;
      node.append(box);
    } else if (token.type !== "space") {
      node.append(block(token, depth + 1));
    }
  }
  return node;
}

function table(token, depth) {
  const cell = (tag, { tokens, align }) => make(tag, { ...(tag === "th" && { scope: "col" }), ...(align && { class: `to-${align}` }) }, ...inline(tokens, depth));
  const row = (tag, cells) => make("tr", {}, ...cells.map((each) => cell(tag, each)));
  const head = make("thead", {}, row("th", token.header));
  const body = make("tbody", {}, ...token.rows.map((cells) => row("td", cells)));
  return make("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, make("table", {}, head, body));
}

function code(token) {
  const language = (token.lang ?? "").trim().split(/\s/)[0];
  const copy = button("Copy", () => copyText(token.text, copy), { "aria-label": "Copy code" });
  const bar = make("div", {}, make("span", { text: language || "code" }), copy);
  const pre = make("pre", { tabindex: "0", role: "group", "aria-label": `Code ${language}` }, make("code", {}, ...highlight(token.text, language)));
  return make("div", { class: "code" }, bar, pre);
}

function highlight(text, language) {
  const { languages, tokenize } = globalThis.Prism ?? { languages: {} };
  const name = language.toLowerCase();
  const known = LANGUAGES[Object.hasOwn(LANGUAGES, name) ? name : ""] ?? name;
  const grammar = Object.hasOwn(languages, known) && languages[known];
  if (!grammar || typeof grammar !== "object" || text.length > LONGEST) return [text];
  const nodes = (tokens) => [tokens].flat().map((token) => (typeof token === "string" ? token : make("span", { class: `t-${token.type}` }, ...nodes(token.content))));
  return nodes(tokenize(text, grammar));
}

function inline(tokens, depth) {
  return tokens.flatMap((token) => span(token, depth + 1));
}

function span(token, depth) {
  if (depth > DEEPEST) return [token.raw];
  switch (token.type) {
    case "text":
    case "escape":
      return token.tokens ? inline(token.tokens, depth) : [token.text];
    case "strong":
    case "em":
    case "del":
      return [make(token.type, {}, ...inline(token.tokens, depth))];
    case "codespan":
      return [make("code", { text: token.text })];
    case "br":
      return [make("br")];
    case "math":
      return [make("span", { class: "math", text: token.raw })];
    case "link":
      return [link(token.href, inline(token.tokens, depth)) ?? token.raw];
    case "image": // none is loaded; a link says what is there
      return [link(token.href, [`Image: ${token.text || token.href}`]) ?? token.raw];
    default: // HTML among others
      return [token.raw];
  }
}

// A link that opens beside the page; null for all but http, https and mailto.
function link(address, children) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!url || !SCHEMES.includes(url.protocol)) return null;
  children = children.map((child) => (child.localName === "a" ? child.textContent : child)); // no link inside a link
  return make("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
