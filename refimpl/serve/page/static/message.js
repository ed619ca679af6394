// One message: its text, its thoughts folded, what can be done with it.

import { button, el, refill } from "./dom.js";
import { codeBlock, markdown } from "./markdown.js";
import { partShown } from "./composer.js";

export class MessageView {
  // actions: { edit, fork, regenerate, look }, each called with the message.
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
    this.thoughts.lastChild.textContent = message.thought || "";
    if (!this.tokens) this.#drawText(busy);
    else this.tail.textContent = message.text.slice(this.seen);
    this.line.textContent = message.progress || "";
    refill(this.line, ...(message.failed ? [el("span", { class: "failed", role: "alert" }, message.failed)] : [this.line.textContent || summary(message)]));
    this.tools.hidden = busy;
    refill(this.tools, ...this.#buttons());
    this.element.setAttribute("aria-busy", String(busy));
  }

  // Shows tokens in the place of the first `seen` characters of the text; null: the text again.
  swap(tokens, seen = 0) {
    this.tokens = tokens;
    this.seen = seen;
    this.tail = el("div", { class: "tail" });
    if (tokens) refill(this.body, tokens, this.tail);
    this.draw(this.element.getAttribute("aria-busy") === "true");
  }

  // A box to change the text in; done(text) or nothing follows.
  edit(done) {
    const input = el("textarea", { rows: String(Math.min(12, this.message.text.split("\n").length + 1)), "aria-label": "Change the message", value: this.message.text });
    const end = () => this.draw();
    input.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); end(); } });
    refill(this.body, input, el("div", { class: "row" }, button("Send", () => done(input.value), { class: "main" }), button("Leave it", end, { class: "quiet" })));
    input.focus();
  }

  #drawText(busy) {
    const { message } = this;
    const parts = (message.parts || []).map(partShown);
    if (message.role === "user") refill(this.body, ...parts, el("p", { class: "said" }, message.text));
    else if (!message.text) refill(this.body, busy && el("p", { class: "hint" }, "…"));
    else if (this.plainText) refill(this.body, codeBlock(message.text, "python"));
    else refill(this.body, markdown(message.text));
  }

  #buttons() {
    const { message, actions } = this;
    const copy = button("Copy", () => navigator.clipboard?.writeText(message.text).then(() => { copy.textContent = "Copied"; }), { class: "quiet" });
    if (message.role === "user") return [copy, button("Edit", () => actions.edit(message), { class: "quiet" })];
    return [copy, actions.isLast(message) && button("Again", () => actions.regenerate(message), { class: "quiet", "aria-label": "Regenerate: answer again" }),
      button("Fork", () => actions.fork(message), { class: "quiet", "aria-label": "Fork: go on from here in a new chat" }),
      message.ids?.length > 0 && button("Look inside", () => actions.look(message), { class: "quiet" })];
  }
}

function summary(message) {
  if (message.role === "user" || !message.stats) return "";
  if (!message.stats.n) return message.stats.stop === "stopped" ? "stopped before the first token" : "nothing was written";
  const { n, per_second, reused, n_prompt, stop } = message.stats;
  const why = { length: ", cut at the longest length", stopped: ", stopped" }[stop] || "";
  return `${n} tokens${per_second ? `, ${per_second.toFixed(1)} a second` : ""}${why}; ${reused} of ${n_prompt} prompt tokens known from before`;
}
