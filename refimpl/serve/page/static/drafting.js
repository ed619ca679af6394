// Drafting: which tokens were proposed, by whom, and what the model made of them; the rounds as a film.

import { about } from "./about.js";
import { el, percent, refill, token } from "./dom.js";

const NAMES = { drafter: "the drafter", repeat: "the text's own past", forced: "the grammar" };
const SHORT = { drafter: "drafter", repeat: "past", forced: "grammar" };
const SHOWN = 40;        // rounds around the one that is looked at

export function draftingPanel(view) {
  const film = el("ol", { class: "film" });
  const note = el("p", { class: "now" });
  const sum = el("p", { class: "note" });
  const filmBox = el("div", { class: "film-box" }, el("h3", {}, "Rounds"), film);

  function update() {
    const { run } = view;
    const { rounds } = run.written;
    sum.textContent = totals(rounds);
    filmBox.hidden = !rounds.length;
    const t = view.place();
    const [n, i] = run.roundOf.get(t) || [-1, 0];
    note.textContent = fate(run, t, n, i);
    if (!rounds.length) return;
    const at = n >= 0 ? n : 0;
    const from = Math.max(0, Math.min(at - SHOWN / 2, rounds.length - SHOWN));
    refill(film, ...rounds.slice(from, from + SHOWN).map((round, k) => frame(run, round, from + k, from + k === n, i, view.select)));
    const now = film.querySelector(".now");
    if (now) film.scrollTop = Math.max(0, now.offsetTop - film.clientHeight / 3);
  }
  return {
    elements: [
      about("A drafter guesses the next tokens cheaply; the model reads all guesses in one pass and keeps those it would have written " +
        "itself (✓). The first wrong guess (✗) is replaced by its own word, which is framed. The text is the same with and without drafts.", "refimpl/decode/speculative.py"),
      note, sum, filmBox,
    ],
    update,
  };
}

function fate(run, t, n, i) {
  if (t < run.n_prompt) return "This token was given, not written.";
  if (n < 0) return "The first token comes out of the reading of the prompt: nothing was drafted for it.";
  const round = run.written.rounds[n];
  const who = NAMES[round.source] || round.source;
  if (i < round.accepted) return `Drafted by ${who} as guess ${i + 1} of ${round.drafted.length}, and accepted.`;
  if (i < round.drafted.length) return `Corrected: ${who} had guessed something else.`;
  return round.drafted.length ? "All guesses before it were right; the model added this one." : "Written by the model alone: nothing was drafted.";
}

function totals(rounds) {
  const drafted = rounds.reduce((sum, round) => sum + round.drafted.length, 0);
  if (!drafted) return rounds.length ? "Nothing was drafted in this run." : "No rounds were recorded with this text.";
  const accepted = rounds.reduce((sum, round) => sum + round.accepted, 0);
  const written = rounds.reduce((sum, round) => sum + round.emitted, 0);
  return `${rounds.length} passes wrote ${written} tokens, ${(written / rounds.length).toFixed(2)} each; ` +
    `${accepted} of ${drafted} guesses were right (${percent(accepted / drafted)}).`;
}

function frame(run, round, n, now, i, select) {
  const guesses = round.drafted.map(([id, text], k) => {
    const kind = k < round.accepted ? "right" : k === round.accepted ? "wrong" : "unread";
    const sign = { right: "✓", wrong: "✗", unread: "" }[kind];
    const spoken = { right: "accepted", wrong: "rejected", unread: "not considered" }[kind];
    return el("span", { class: `guess ${kind}` }, token(text), sign && el("span", { "aria-hidden": "true" }, sign), el("span", { class: "unseen" }, spoken));
  });
  const own = round.at + round.accepted;
  const last = round.emitted > round.accepted && own < run.length
    ? el("span", { class: "guess own" }, token(run.text(own)), el("span", { class: "unseen" }, "the model's own")) : null;
  const took = `${(round.draft_ms + round.verify_ms).toFixed(1)} ms`;
  const label = `round ${n + 1}`;
  return el("li", { class: now ? "now" : "", "aria-current": now ? "true" : undefined },
    el("span", { class: "who-drafted" }, el("button", { type: "button", class: "frame", on: { click: () => select(round.at) } }, label),
      round.drafted.length > 0 && el("span", { class: "hint" }, SHORT[round.source] || round.source)),
    el("span", { class: "guesses" }, ...guesses, last), el("span", { class: "number" }, took));
}
