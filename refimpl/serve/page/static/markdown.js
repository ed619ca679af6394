// The part of Markdown that models write, as elements: headings, lists, tables, quotes, code, emphasis, links. Text never becomes markup.

import { button, el } from "./dom.js";

const REACH = 2000;      // characters in which the end of an emphasis or a link is looked for
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

export function markdown(text) {
  const box = document.createDocumentFragment();
  box.append(...blocksOf(text.split("\n")));
  return box;
}

function blocksOf(lines) {
  const made = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const fence = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/.exec(line);
    if (!line.trim()) {
      i++;
    } else if (fence) {
      const end = closing(lines, i + 1, fence[1]);
      made.push(codeBlock(lines.slice(i + 1, end).join("\n"), fence[2]));
      i = end + 1;
    } else if (/^#{1,6}\s/.test(line)) {
      const level = /^#+/.exec(line)[0].length;
      made.push(el(`h${Math.min(6, level + 2)}`, {}, ...inline(line.slice(level).trim())));
      i++;
    } else if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      made.push(el("hr"));
      i++;
    } else if (/^\s{0,3}>/.test(line)) {
      const end = until(lines, i, (each) => !/^\s{0,3}>/.test(each));
      made.push(el("blockquote", {}, ...blocksOf(lines.slice(i, end).map((each) => each.replace(/^\s{0,3}> ?/, "")))));
      i = end;
    } else if (ITEM.test(line)) {
      const end = endOfList(lines, i);
      made.push(listOf(lines.slice(i, end)));
      i = end;
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[i + 1] || "")) {
      const end = until(lines, i + 2, (each) => !each.includes("|"));
      made.push(tableOf(lines.slice(i, end)));
      i = end;
    } else {
      const end = until(lines, i + 1, (each) => !each.trim() || /^\s{0,3}(```|~~~|#{1,6}\s|>)/.test(each) || ITEM.test(each));
      made.push(el("p", {}, ...inline(lines.slice(i, end).join("\n"))));
      i = end;
    }
  }
  return made;
}

function until(lines, from, stop) {
  let end = from;
  while (end < lines.length && !stop(lines[end])) end++;
  return end;
}

function closing(lines, from, fence) {
  return until(lines, from, (each) => each.trim().startsWith(fence) && !each.trim().slice(fence.length).trim());
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

function listOf(lines) {
  const [, indent, sign] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items[items.length - 1].push(line.slice(Math.min(indent.length + 2, line.length - line.trimStart().length)));
  }
  const ordered = /\d/.test(sign);
  return el(ordered ? "ol" : "ul", { start: ordered ? String(parseInt(sign, 10)) : undefined }, ...items.map((item) => {
    const inner = blocksOf(item);
    return el("li", {}, ...(inner.length && inner[0].tagName === "P" ? [...inner[0].childNodes, ...inner.slice(1)] : inner));
  }));
}

function tableOf(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const [head, , ...rows] = lines.map(cells);
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((cell) => el("th", { scope: "col" }, ...inline(cell))))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, ...inline(cell))))))));
}

export function codeBlock(text, language) {
  const copy = button("Copy", () => navigator.clipboard?.writeText(text).then(() => { copy.textContent = "Copied"; }), { class: "copy quiet" });
  return el("div", { class: "code" }, el("div", { class: "code-head" }, el("span", {}, language || "code"), copy),
    el("pre", { tabindex: "0" }, el("code", {}, text)));
}

// Emphasis, code, links; what has no end is left as it is.
function inline(text) {
  const made = [];
  let plain = "";
  const flush = () => { if (plain) made.push(plain); plain = ""; };
  for (let i = 0; i < text.length;) {
    const found = spanAt(text, i);
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

function spanAt(text, i) {
  if (text[i] === "\\" && /[\\`*_{}[\]()#+.!|>~-]/.test(text[i + 1] || "")) return [text[i + 1], i + 2];
  if (text[i] === "`") {
    const ticks = /^`+/.exec(text.slice(i, i + 16))[0];
    const end = endOf(text, i + ticks.length, ticks);
    return end < 0 ? null : [el("code", {}, text.slice(i + ticks.length, end).trim()), end + ticks.length];
  }
  for (const [sign, name] of [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]]) {
    if (!text.startsWith(sign, i) || /\s|^$/.test(text[i + sign.length] || "") || (sign[0] === "_" && /\w/.test(text[i - 1] || ""))) continue;
    const end = endOf(text, i + sign.length + 1, sign);
    if (end > 0 && !/\s/.test(text[end - 1])) return [el(name, {}, ...inline(text.slice(i + sign.length, end))), end + sign.length];
  }
  if (text[i] === "[") {
    const middle = endOf(text, i + 1, "](");
    const end = middle < 0 ? -1 : endOf(text, middle + 2, ")");
    const address = end < 0 ? "" : text.slice(middle + 2, end).trim();
    if (/^https?:\/\/[^\s]+$/i.test(address)) {
      return [el("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, ...inline(text.slice(i + 1, middle))), end + 1];
    }
  }
  return null;
}

function endOf(text, from, sign) {
  const end = text.slice(from, from + REACH).indexOf(sign);
  return end < 0 ? -1 : from + end;
}
