// The glass: a record's text with seven panels about the token that is touched, and a player that goes through the text.

import { attentionPanel } from "./attention.js";
import { blockPanel } from "./block.js";
import { button, el, refill } from "./dom.js";
import { draftingPanel } from "./drafting.js";
import { expertsPanel } from "./experts.js";
import { lensPanel } from "./lens.js";
import { likelyPanel } from "./likely.js";
import { COLOURS } from "./options.js";
import { readingPanel } from "./reading.js";
import { Run } from "./record.js";
import { TokenText, tokenAt } from "./tokens.js";

const PANELS = [
  ["likely", "Likely", likelyPanel], ["drafting", "Drafting", draftingPanel], ["experts", "Experts", expertsPanel],
  ["attention", "Attention", attentionPanel], ["lens", "Layers", lensPanel], ["reading", "Reading", readingPanel],
  ["block", "Weights", blockPanel],
];
const STEP_MS = 120;
export const NOTHING = "Send a message: the answer can then be taken apart here, token by token.";

export class Glass {
  // askBlock(tensor, row, block): a promise of a block; null where there is no server to ask.
  constructor(pane, askBlock) {
    this.pane = pane;
    this.askBlock = askBlock;
    this.open = "likely";
    this.t = -1;
    this.playing = null;
    this.width = window.innerWidth;
    window.addEventListener("resize", () => {         // a phone's keyboard changes the height only
      clearTimeout(this.resized);
      this.resized = setTimeout(() => {
        if (window.innerWidth !== this.width) this.#redraw();
        this.width = window.innerWidth;
      }, 150);
    });
    document.addEventListener(COLOURS, () => this.#redraw());
    this.wait(NOTHING);
  }

  // A line instead of panels.
  wait(line, failed = false) {
    this.#stop();
    this.run = null;
    refill(this.pane, el("h2", {}, "Glass"), el("p", { class: failed ? "failed" : "hint", role: failed ? "alert" : undefined }, line));
  }

  // Shows a record. Returns the element with its tokens, for whoever shows the text.
  // growing: the text is still being written; the place follows it until somebody chooses one.
  show(record, keepPlace = false, growing = false) {
    const before = this.run;
    this.run = new Run(record);
    if (keepPlace && before && this.run.continues(before)) return this.#grown(growing);
    this.#stop();
    this.touched &&= keepPlace;
    this.text = new TokenText(this.run, (t) => this.#touch(t));
    this.heading = el("p", { class: "which" });
    this.#player();
    this.tabs = PANELS.map(([name, title]) => el("button", {
      type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", on: { click: () => this.#turn(name) },
    }, title));
    this.body = el("section", { id: "panel", role: "tabpanel", tabindex: "0" });
    refill(this.pane, el("h2", {}, "Glass"), this.heading, this.player,
      el("div", { role: "tablist", "aria-label": "What to look at", class: "tabs", on: { keydown: (event) => this.#key(event) } }, ...this.tabs),
      this.body, el("p", { class: "hint foot" }, "The finished text was run once more, with the box open. What a pass computes depends on the tokens it has " +
        "read and on nothing else, to the last bit: so these are the numbers with which the text was written."));
    const begin = Math.min(this.run.n_prompt, this.run.length - 1);
    const start = growing && !this.touched ? this.run.length - 1 : keepPlace && this.t > 0 ? this.t : begin;
    this.t = Math.min(start, this.run.length - 1);
    this.#turn(this.open);
    this.select(this.t, false);
    return this.text.element;
  }

  // The same text, and more of it: everything stays where it is, whatever has the focus.
  #grown(growing) {
    this.text.extend(this.run);
    this.slider.max = String(this.run.length - 1);
    this.select(growing && !this.touched ? this.run.length - 1 : this.t, false);
    return this.text.element;
  }

  // Canvases have the width, and the colours, of their time.
  #redraw() {
    if (this.run) this.#turn(this.open);
  }

  select(t, scroll = true) {
    if (!this.run || this.run.length < 2) return;
    this.t = Math.max(1, Math.min(this.run.length - 1, t));
    this.text.select(this.t, scroll);
    this.slider.value = this.t;
    this.slider.setAttribute("aria-valuetext", `token ${this.t} of ${this.run.length - 1}`);
    const given = this.t < this.run.n_prompt;
    refill(this.heading, given ? "Given: " : "Written: ", tokenAt(this.run, this.t), ` at place ${this.t}, by the pass that read `,
      tokenAt(this.run, this.t - 1), given && !this.run.softAt(this.t) ? " (which could have written something else)." : ".");
    this.panel.update();
  }

  #touch(t) {
    this.touched = true;
    this.#stop();
    this.select(t);
  }

  #player() {
    this.slider = el("input", {
      type: "range", min: "1", max: String(this.run.length - 1), value: "1", "aria-label": "Place in the text",
      on: { input: () => this.#touch(Number(this.slider.value)) },
    });
    this.play = button("Play", () => (this.playing ? this.#stop() : this.#start()), { class: "play" });
    this.player = el("div", { class: "player" }, this.play, this.slider);
  }

  #start() {
    this.touched = true;
    if (this.t >= this.run.length - 1) this.t = Math.max(0, this.run.n_prompt - 1);
    this.play.textContent = "Pause";
    this.playing = setInterval(() => {
      this.select(this.t + 1);
      if (this.t >= this.run.length - 1) this.#stop();
    }, STEP_MS);
  }

  #stop() {
    if (this.playing) clearInterval(this.playing);
    this.playing = null;
    if (this.play) this.play.textContent = "Play";
  }

  #turn(name) {
    this.open = name;
    this.text.shade(null);
    PANELS.forEach(([each], i) => {
      this.tabs[i].setAttribute("aria-selected", String(each === name));
      this.tabs[i].tabIndex = each === name ? 0 : -1;
    });
    this.body.setAttribute("aria-labelledby", `tab-${name}`);
    const glass = this;
    const view = {
      get run() { return glass.run; }, askBlock: this.askBlock, select: (t) => this.#touch(t), shade: (weights) => this.text.shade(weights),
      width: () => Math.max(240, this.body.clientWidth - 8), place: () => this.t,
    };
    this.panel = PANELS.find(([each]) => each === name)[2](view);
    refill(this.body, ...this.panel.elements);
    this.panel.update();
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -PANELS.length, End: PANELS.length }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const now = PANELS.findIndex(([each]) => each === this.open);
    const next = Math.abs(step) > 1 ? (step < 0 ? 0 : PANELS.length - 1) : (now + step + PANELS.length) % PANELS.length;
    this.#turn(PANELS[next][0]);
    this.tabs[next].focus();
  }
}
