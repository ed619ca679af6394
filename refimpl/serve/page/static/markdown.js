// The part of Markdown that models write, as elements: headings, lists, tables, quotes, code, emphasis, links. Text never becomes markup.

import { copyButton, el, grow } from "./dom.js";

const REACH = 2000;      // characters in which the end of an emphasis or a link is looked for
const DEEPEST = 8;       // levels of quotes, lists and emphasis inside each other: what is deeper stays text
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;

// A text that grows. Blocks that nothing can change any more stay the elements that they are; the last ones are made anew.
export class Growing {
  constructor(box) {
    this.box = box;
    this.text = "";
    this.done = 0;                // characters in finished blocks
    this.levels = [];             // of their headings
    this.open = [];               // elements of the blocks behind them
  }

  show(text) {
    if (!text.startsWith(this.text)) {
      this.box.replaceChildren();
      Object.assign(this, { done: 0, levels: [], open: [] });
    }
    this.text = text;
    const lines = text.slice(this.done).split("\n");
    const levels = this.levels.slice(), made = [];
    let finished = 0, at = this.done, i = 0;
    while (i < lines.length) {
      const [end, make] = blockAt(lines, i, 0, levels);
      if (make) made.push(make(this.open[made.length]));
      for (; i < Math.min(end, lines.length); i++) at += lines[i].length + 1;
      if (end + 1 < lines.length - 1) {                  // decided by whole lines only: a block looks one line beyond its end
        finished = made.length;
        this.levels = levels.slice();
        this.done = at;
      }
    }
    this.open.forEach((old, n) => { if (old !== made[n]) made[n] ? old.replaceWith(made[n]) : old.remove(); });
    this.box.append(...made.slice(this.open.length));
    this.open = made.slice(finished);
  }
}

function blocksOf(lines, depth, levels) {
  if (depth > DEEPEST) return [el("p", { dir: "auto" }, lines.join("\n"))];
  const made = [];
  let i = 0;
  while (i < lines.length) {
    const [end, make] = blockAt(lines, i, depth, levels);
    if (make) made.push(make());
    i = end;
  }
  return made;
}

// Where the block that begins at line `i` ends, and what makes its element: out of the one that was there before, where that can grow.
function blockAt(lines, i, depth, levels) {
  const line = lines[i];
  if (!line.trim()) return [i + 1, null];
  const fence = FENCE.exec(line);
  if (fence && !(fence[1][0] === "`" && line.slice(fence[0].length).includes("`"))) {
    const end = until(lines, i + 1, (each) => closes(each.trim(), fence[1]));
    return [end + 1, (old) => codeBlock(lines.slice(i + 1, end).join("\n"), fence[2], old)];
  }
  if (/^#{1,6}\s/.test(line)) {
    const level = /^#+/.exec(line)[0].length;
    const name = `h${heading(level, levels)}`;
    return [i + 1, () => el(name, { dir: "auto" }, ...inline(line.slice(level).trim()))];
  }
  if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) return [i + 1, () => el("hr")];
  if (/^\s{0,3}>/.test(line)) {
    const end = until(lines, i, (each) => !/^\s{0,3}>/.test(each));
    return [end, () => el("blockquote", {}, ...blocksOf(lines.slice(i, end).map((each) => each.replace(/^\s{0,3}> ?/, "")), depth + 1, levels.slice()))];
  }
  if (ITEM.test(line)) {
    const end = endOfList(lines, i);
    return [end, () => listOf(lines.slice(i, end), depth, levels)];
  }
  if (line.includes("|") && isRule(lines[i + 1] || "")) {
    const end = until(lines, i + 2, (each) => !each.includes("|"));
    return [end, () => tableOf(lines.slice(i, end))];
  }
  const end = until(lines, i + 1, (each) => !each.trim() || /^\s{0,3}(```|~~~|#{1,6}\s|>)/.test(each) || ITEM.test(each));
  return [end, () => el("p", { dir: "auto" }, ...inline(lines.slice(i, end).join("\n")))];
}

function until(lines, from, stop) {
  let end = from;
  while (end < lines.length && !stop(lines[end])) end++;
  return end;
}

function closes(line, fence) {
  return line.length >= fence.length && line === fence[0].repeat(line.length);
}

// The level that a heading gets below that of its message: no level is left out, whichever the model begins with.
function heading(level, levels) {
  while (levels.length && levels[levels.length - 1] >= level) levels.pop();
  levels.push(level);
  return Math.min(6, 2 + levels.length);
}

// The line below a table's head.
function isRule(line) {
  return line.includes("-") && cellsOf(line).every((cell) => /^:?-+:?$/.test(cell));
}

function endOfList(lines, from) {
  let end = from + 1;
  while (end < lines.length) {
    const goesOn = ITEM.test(lines[end]) || /^\s+\S/.test(lines[end]) || (!lines[end].trim() && /^\s+\S|^\s*([-*+]|\d+[.)])\s/.test(lines[end + 1] || ""));
    if (!goesOn) break;
    end++;
  }
  return end;
}

function listOf(lines, depth, levels) {
  const [, indent, sign] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items[items.length - 1].push(line.slice(Math.min(indent.length + 2, line.length - line.trimStart().length)));
  }
  const ordered = /\d/.test(sign);
  return el(ordered ? "ol" : "ul", { dir: "auto", start: ordered ? String(parseInt(sign, 10)) : undefined }, ...items.map((item) => {
    const inner = blocksOf(item, depth + 1, levels.slice());
    return el("li", {}, ...(inner.length && inner[0].tagName === "P" ? [...inner[0].childNodes, ...inner.slice(1)] : inner));
  }));
}

function cellsOf(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
}

function tableOf(lines) {
  const [head, , ...rows] = lines.map(cellsOf);
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }, el("table", { dir: "auto" },
    el("thead", {}, el("tr", {}, ...head.map((cell) => el("th", { scope: "col" }, ...inline(cell))))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, ...inline(cell))))))));
}

// A box of code. `old`: one that may be grown instead.
export function codeBlock(text, language, old = null) {
  const name = language || "code";
  if (old?.className === "code" && old.querySelector("span").textContent === name) {
    grow(old.querySelector("pre > code"), text);
    return old;
  }
  const code = el("code", {}, text);
  return el("div", { class: "code" }, el("div", { class: "code-head" }, el("span", {}, name), copyButton(() => code.textContent, { class: "copy quiet" })),
    el("pre", { tabindex: "0" }, code));
}

// Emphasis, code, links; what has no end is left as it is.
function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const made = [];
  let plain = "";
  const flush = () => { if (plain) made.push(plain); plain = ""; };
  for (let i = 0; i < text.length;) {
    const found = spanAt(text, i, depth);
    if (found) {
      flush();
      made.push(found[0]);
      i = found[1];
    } else {
      plain += text[i++];
    }
  }
  flush();
  return made;
}

function spanAt(text, i, depth) {
  if (!"\\`*_~[".includes(text[i])) return null;
  if (text[i] === "\\" && /[\\`*_{}[\]()#+.!|>~-]/.test(text[i + 1] || "")) return [text[i + 1], i + 2];
  if (text[i] === "`") {
    const ticks = /^`+/.exec(text.slice(i, i + 16))[0];
    const end = endOf(text, i + ticks.length, ticks);
    return end < 0 ? null : [el("code", {}, text.slice(i + ticks.length, end).trim()), end + ticks.length];
  }
  for (const [sign, name] of [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]]) {
    if (!text.startsWith(sign, i) || /\s|^$/.test(text[i + sign.length] || "") || (sign[0] === "_" && /\w/.test(text[i - 1] || ""))) continue;
    const end = endOf(text, i + sign.length + 1, sign);
    if (end > 0 && !/\s/.test(text[end - 1])) return [el(name, {}, ...inline(text.slice(i + sign.length, end), depth + 1)), end + sign.length];
  }
  if (text[i] === "[") {
    const middle = endOf(text, i + 1, "](");
    const end = middle < 0 ? -1 : endOf(text, middle + 2, ")");
    const address = end < 0 ? "" : text.slice(middle + 2, end).trim();
    if (/^https?:\/\/[^\s]+$/i.test(address)) {
      return [el("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, ...inline(text.slice(i + 1, middle), depth + 1)), end + 1];
    }
  }
  return null;
}

function endOf(text, from, sign) {
  const end = text.slice(from, from + REACH).indexOf(sign);
  return end < 0 ? -1 : from + end;
}
