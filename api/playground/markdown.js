// Markdown on the page, while it is still being written.
//
// markdown-it reads it; what it finds becomes elements here, from the short list below. Nothing is ever parsed as HTML,
// no address but http, https and mailto becomes a link, and a picture becomes a link to it. A block that another one
// follows is never looked at again, so a long answer costs as much as its parts. Knows not where text comes from.

import MarkdownIt from "./markdown-it.js";

const parser = new MarkdownIt({ html: false, linkify: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });

const DEFINES = "]:"; // no link definition is without it
const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const HEADINGS = { h1: "h3", h2: "h4", h3: "h5", h4: "h6", h5: "h6", h6: "h6" }; // the page has h1 and h2
const ELEMENTS = new Set([
  ...["p", "ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "hr"],
  ...["strong", "em", "s", "br", "code"],
]);

/** A box that Markdown is streamed into: `append` as often as you like, `paint` when it is to be seen. */
export class Markdown {
  constructor(box) {
    this.box = box;
    this.clear();
  }

  clear() {
    this.box.replaceChildren();
    this.open = ""; // what follows the last settled block
    this.closed = 0; // how many nodes of the box are settled
    this.links = {}; // link definitions in what is settled, which later blocks may refer to
    this.settled = []; // the text of what is settled, for `end`
  }

  append(text) {
    this.open += text;
  }

  /** Show all there is. What has become certain is settled. */
  paint() {
    this.open = this.open.replace(/\r\n|\r(?!$)/g, "\n");
    const { nodes, lines } = read(this.open, { references: { ...this.links.references } });
    patch(this.box, this.closed, nodes);
    this.settle(lines);
  }

  /** Nothing more comes. A link definition may stand behind its use, so then everything is read again. */
  end() {
    this.paint();
    const text = [...this.settled, this.open].join("");
    if (text.includes(DEFINES)) patch(this.box, 0, read(text, {}).nodes);
  }

  /** A block is certain once two whole lines of the next one are there: a table shows itself by its second line. */
  settle(lines) {
    const whole = count(this.open, "\n");
    let blocks = lines.length - 1;
    while (blocks > 0 && lines[blocks] + 2 > whole) blocks -= 1;
    if (blocks <= 0) return;
    const offset = startOfLine(this.open, lines[blocks]);
    const certain = this.open.slice(0, offset);
    this.settled.push(certain);
    if (certain.includes(DEFINES)) parser.parse(certain, this.links);
    this.open = this.open.slice(offset);
    this.closed += blocks;
  }
}

/** The top blocks of a text as one node each, and the line at which each begins. */
function read(text, links) {
  const top = document.createElement("div");
  const lines = [];
  const path = [top];
  for (const token of parser.parse(text, links)) {
    if (token.level === 0 && token.nesting >= 0) lines.push(token.map[0]);
    place(token, path);
  }
  return { nodes: [...top.childNodes], lines };
}

/** Put a token's element where the path leads, and walk into it or out of it. */
function place(token, path) {
  if (token.type === "inline") return inline(token.children, path.at(-1));
  if (token.nesting < 0) return void path.pop();
  const [outer, inner] = element(token, path.at(-1));
  if (outer !== inner || outer !== path.at(-1)) path.at(-1).append(outer);
  if (token.nesting > 0) path.push(inner);
}

/** What a token is shown as: the node to add, and the one that takes its children. */
function element(token, parent) {
  if (token.hidden) return [parent, parent]; // the paragraph of a tight list
  if (token.type === "fence" || token.type === "code_block") return twice(codeBlock(token));
  const name = HEADINGS[token.tag] ?? token.tag;
  const made = make(ELEMENTS.has(name) || HEADINGS[token.tag] ? name : "p");
  if (HEADINGS[token.tag]) made.dataset.level = token.tag[1];
  if (name === "ol" && token.attrGet("start")) made.start = Number(token.attrGet("start"));
  if (name === "th" || name === "td") made.dataset.align = /right|center/.exec(token.attrGet("style") ?? "") ?? "left";
  if (name === "table") return [scrolling(made), made];
  return twice(made);
}

const twice = (node) => [node, node];

function make(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** Wide content scrolls in a box of its own, which the keyboard can reach. */
function scrolling(table) {
  const box = make("div", "wide");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "Table");
  box.append(table);
  return box;
}

/** The page copies on a click on any `.copy`, so that a block that is patched loses no listener. */
function codeBlock({ info, content }) {
  const figure = make("figure", "code");
  const head = make("figcaption");
  const copy = make("button", "copy small", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", "Copy this code");
  const language = (info ?? "").trim().split(/\s+/)[0].slice(0, 24);
  head.append(make("span", "language", language || "text"), copy);
  const pre = make("pre");
  pre.tabIndex = 0;
  pre.append(make("code", "", content));
  figure.append(head, pre);
  return figure;
}

function inline(tokens, parent) {
  const path = [parent];
  for (const token of tokens) {
    const into = path.at(-1);
    if (token.type === "link_open") path.push(anchor(token.attrGet("href"), into));
    else if (token.nesting > 0) path.push(added(make(ELEMENTS.has(token.tag) ? token.tag : "span"), into));
    else if (token.nesting < 0) path.pop();
    else leaf(token, into);
  }
}

function leaf(token, into) {
  if (token.type === "softbreak") into.append("\n");
  else if (token.type === "hardbreak") into.append(make("br"));
  else if (token.type === "code_inline") into.append(make("code", "", token.content));
  else if (token.type === "image") anchor(token.attrGet("src"), into).append(token.content || "picture");
  else into.append(token.content);
}

function added(node, parent) {
  parent.append(node);
  return node;
}

/** A link where the address is one that may be followed; otherwise its words alone. Links do not hold links. */
function anchor(address, parent) {
  if (!mayBeFollowed(address) || parent.closest("a")) return added(make("span"), parent);
  const link = added(make("a"), parent);
  Object.assign(link, { href: address, target: "_blank", rel: "noopener noreferrer" });
  return link;
}

/** Absolute, and of a scheme that runs nothing. */
export function mayBeFollowed(address) {
  return URL.canParse(address ?? "") && SCHEMES.has(new URL(address).protocol);
}

// ---- making what is there like what should be there ----

/** Give `parent` these children from place `from` on, and keep each node that is already as it should be: a
 *  selection, the focus and the place in a scrolled box live in nodes. */
function patch(parent, from, nodes) {
  for (const [offset, node] of nodes.entries()) {
    const old = parent.childNodes[from + offset];
    if (old === undefined) parent.append(node);
    else become(old, node);
  }
  while (parent.childNodes.length > from + nodes.length) parent.lastChild.remove();
}

function become(old, node) {
  if (old.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) return spell(old, node.data);
  if (!old.cloneNode(false).isEqualNode(node.cloneNode(false))) return old.replaceWith(node);
  patch(old, 0, [...node.childNodes]);
}

function spell(text, data) {
  if (text.data === data) return;
  if (data.startsWith(text.data)) text.appendData(data.slice(text.length));
  else text.data = data;
}

function count(text, character) {
  let found = 0;
  for (let at = text.indexOf(character); at >= 0; at = text.indexOf(character, at + 1)) found += 1;
  return found;
}

function startOfLine(text, line) {
  let at = 0;
  for (let passed = 0; passed < line; passed += 1) at = text.indexOf("\n", at) + 1;
  return at;
}
