// The text, token by token: a list box whose tokens can be touched, walked over with the arrow keys, and shaded.

import { el, percent } from "./dom.js";

const LEVELS = [0.9, 0.5, 0.2, 0.05];        // probabilities between the shades of surprise

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

  #span(t) {
    const text = this.run.texts[t];
    const shown = this.run.ids[t] < 0 ? "▦" : text;
    const kind = ["tok", `s${this.#surprise(t)}`];
    if (!shown) kind.push("part");
    if (text.includes("\n")) kind.push("newline");
    const how = this.#drafted(t);
    if (how) kind.push(how);
    const made = el("span", { id: `tok-${t}`, class: kind.join(" "), role: "option", "aria-selected": "false" }, shown);
    if (!shown.trim()) made.setAttribute("aria-label", shown.includes("\n") ? "line end" : shown ? "blank" : "part of a character");
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
    const t = this.spans.indexOf(event.target.closest(".tok"));
    if (t >= 0) this.onSelect(Math.max(1, t));
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.onSelect(Math.max(1, Math.min(this.run.length - 1, this.selected + step)));
  }
}
