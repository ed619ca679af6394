// One message: its text, its thoughts folded, what can be done with it.

import { partShown } from "./composer.js";
import { button, copyButton, el, grow, refill } from "./dom.js";
import { Growing, codeBlock } from "./markdown.js";

export class MessageView {
  // actions: { edit, fork, regenerate, look }, each called with the message; isLast(message).
  constructor(message, plainText, actions) {
    this.message = message;
    this.plainText = plainText;
    this.actions = actions;
    this.thoughts = el("details", { class: "thoughts", hidden: true }, el("summary", {}, "Thoughts"), el("div", { class: "thought" }));
    this.body = el("div", { class: "body" });
    this.line = el("p", { class: "meta" });
    this.tools = el("div", { class: "tools" });
    const who = message.role === "user" ? "You" : "Model";
    this.element = el("article", { class: `message ${message.role}`, "aria-label": who }, el("h2", { class: "who" }, who),
      message.role === "user" ? null : this.thoughts, this.body, this.line, this.tools);
    this.draw();
  }

  draw(busy = false) {
    const { message } = this;
    this.thoughts.hidden = !message.thought;
    grow(this.thoughts.lastChild, message.thought || "");
    if (!this.tokens) this.#drawText(busy);
    else grow(this.tail, message.text.slice(this.seen));
    this.#drawLine();
    this.element.setAttribute("aria-busy", String(busy));
    this.tools.hidden = busy;
    if (!busy) this.drawTools();
  }

  // What can be done with it: less once it is not the last one any more.
  drawTools() {
    refill(this.tools, ...this.#buttons());
  }

  // Shows tokens in the place of the first `seen` characters of the text; null: the text again.
  swap(tokens, seen = 0) {
    if (tokens !== this.tokens || !tokens) this.#fresh();
    if (tokens && tokens !== this.tokens) {
      this.tail = el("div", { class: "tail" });
      refill(this.body, tokens, this.tail);
    }
    this.tokens = tokens;
    this.seen = seen;
    this.draw(this.element.getAttribute("aria-busy") === "true");
  }

  // A box to change the text in; done(text) or nothing follows.
  edit(done) {
    const input = el("textarea", { rows: String(Math.min(12, this.message.text.split("\n").length + 1)), dir: "auto", "aria-label": "Change the message", value: this.message.text });
    const end = () => { this.draw(); this.tools.querySelectorAll("button")[1].focus(); };
    input.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); end(); } });
    const send = () => { if (input.value.trim() || this.message.parts?.length) done(input.value); };
    refill(this.body, input, el("div", { class: "row" }, button("Send", send, { class: "main" }), button("Leave it", end, { class: "quiet" })));
    input.focus();
  }

  #fresh() {
    this.growing = this.code = null;
    this.body.replaceChildren();
  }

  #drawText(busy) {
    const { message } = this;
    if (message.role === "user") {
      refill(this.body, ...(message.parts || []).map(partShown), el("p", { class: "said" }, message.text));
    } else if (!message.text) {
      refill(this.body, busy && el("p", { class: "hint" }, "…"));
    } else if (this.plainText) {
      const before = this.code;
      this.code = codeBlock(message.text, "python", before);
      if (this.code !== before) refill(this.body, this.code);
    } else {
      if (!this.growing) this.body.replaceChildren();
      this.growing ||= new Growing(this.body);
      this.growing.show(message.text);
    }
  }

  #drawLine() {
    const { failed, progress } = this.message;
    const text = failed || progress || summary(this.message);
    if (this.line.textContent !== text) refill(this.line, failed ? el("span", { class: "failed", role: "alert" }, failed) : text);
  }

  #buttons() {
    const { message, actions } = this;
    const copy = copyButton(() => message.text, { class: "quiet" });
    if (message.role === "user") return [copy, button("Edit", () => actions.edit(message), { class: "quiet" })];
    return [copy, actions.isLast(message) && button("Again", () => actions.regenerate(message), { class: "quiet", "aria-label": "Regenerate: answer again" }),
      button("Fork", () => actions.fork(message), { class: "quiet", "aria-label": "Fork: go on from here in a new chat" }),
      message.ids?.length > 0 && button("Look inside", () => actions.look(message), { class: "quiet" })];
  }
}

function summary(message) {
  if (message.role === "user" || !message.stats) return "";
  const seed = message.seed ? `; seed ${message.seed}` : "";
  if (!message.stats.n) return (message.stats.stop === "stopped" ? "stopped before the first token" : "nothing was written") + seed;
  const { n, per_second, reused, n_prompt, stop } = message.stats;
  const why = { length: ", cut at the longest length", stopped: ", stopped" }[stop] || "";
  return `${n} tokens${per_second ? `, ${per_second.toFixed(1)} a second` : ""}${why}; ${reused} of ${n_prompt} prompt tokens known from before${seed}`;
}
