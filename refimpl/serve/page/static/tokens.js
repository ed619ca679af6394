// The text, token by token: a list box whose tokens can be touched, walked over with the arrow keys, and shaded.

import { el, percent, token } from "./dom.js";

const LEVELS = [0.9, 0.5, 0.2, 0.05];        // probabilities between the shades of surprise

// What stands at a place, as a sign in a sentence.
export function tokenAt(run, t) {
  const part = run.softAt(t);
  return part ? el("span", { class: "token" }, `row ${t - part.first + 1} of ${part.n} of a picture or sound`) : token(run.text(t));
}

export class TokenText {
  constructor(run, onSelect) {
    this.run = run;
    this.onSelect = onSelect;
    this.selected = -1;
    this.shaded = [];
    this.spans = run.ids.map((id, t) => this.#span(t));
    this.given = el("div", { class: "given", role: "group", "aria-label": "What the model was given" }, ...this.spans.slice(0, run.n_prompt));
    this.rest = el("div", { class: "rest", role: "group", "aria-label": "What it wrote" }, ...this.spans.slice(run.n_prompt));
    this.element = el("div", {
      class: "tokens", role: "listbox", tabindex: "0", "aria-label": "Tokens. Arrow keys go from one to the next.",
      on: { keydown: (event) => this.#key(event), click: (event) => this.#click(event) },
    }, this.given, this.rest);
  }

  // Goes over to the record of the same text when it is longer: only what is new is touched, and the last token, which may go on.
  extend(run) {
    const old = this.spans.length - 1;
    this.run = run;
    const added = run.ids.slice(old).map((id, i) => this.#span(old + i));
    const box = old < run.n_prompt ? this.given : this.rest;
    added[0].setAttribute("aria-selected", String(old === this.selected));
    this.spans[old].replaceWith(added[0]);
    box.append(...added.slice(1));
    this.spans.splice(old, 1, ...added);
  }

  #span(t) {
    const text = this.run.texts[t];
    const soft = this.run.softAt(t);
    const shown = soft ? "▦" : text;
    const kind = ["tok", `s${this.#surprise(t)}`];
    if (!shown) kind.push("part");
    if (text.includes("\n")) kind.push("newline");
    const how = this.#drafted(t);
    if (how) kind.push(how);
    const made = el("span", { id: `tok-${t}`, class: kind.join(" "), role: "option", "aria-selected": "false" }, shown);
    if (soft) made.setAttribute("aria-label", `row ${t - soft.first + 1} of ${soft.n} of a picture or sound`);
    else if (!shown.trim()) made.setAttribute("aria-label", shown.includes("\n") ? "line end" : shown ? "blank" : "part of a character");
    return made;
  }

  #surprise(t) {
    const chosen = t >= this.run.n_prompt ? this.run.chosen(t) : null;
    return chosen ? LEVELS.findIndex((level) => chosen.share >= level) + 1 || 5 : 0;
  }

  #drafted(t) {
    const [n, i] = this.run.roundOf.get(t) || [-1, 0];
    return n >= 0 && i < this.run.written.rounds[n].accepted ? "drafted" : "";
  }

  select(t, scroll = true) {
    t = Math.max(1, Math.min(this.run.length - 1, t));
    const before = this.spans[this.selected];
    if (before) before.setAttribute("aria-selected", "false");
    this.selected = t;
    const span = this.spans[t];
    span.setAttribute("aria-selected", "true");
    const chosen = this.run.chosen(t);
    if (chosen) span.setAttribute("title", `place ${t}, probability ${percent(chosen.share)}`);
    this.element.setAttribute("aria-activedescendant", span.id);
    if (scroll) span.scrollIntoView({ block: "nearest" });
  }

  // weights: place -> 0 to 1.
  shade(weights) {
    for (const t of this.shaded) {
      this.spans[t].style.backgroundColor = "";
      this.spans[t].classList.remove("looked-at");
    }
    this.shaded = [];
    this.element.classList.toggle("shading", weights !== null);
    for (const [t, weight] of weights || []) {
      if (weight < 0.01 || t >= this.spans.length) continue;
      this.spans[t].style.backgroundColor = `color-mix(in srgb, var(--shade) ${Math.round(15 + 70 * Math.sqrt(weight))}%, transparent)`;
      this.spans[t].classList.add("looked-at");
      this.shaded.push(t);
    }
  }

  #click(event) {
    const span = event.target.closest(".tok");
    if (span) this.onSelect(Math.max(1, Number(span.id.slice("tok-".length))));
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.onSelect(Math.max(1, Math.min(this.run.length - 1, this.selected + step)));
  }
}
