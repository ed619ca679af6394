// What else was likely: ten tokens with their probabilities, and a temperature that moves them.

import { about } from "./about.js";
import { bar, el, percent, refill, token } from "./dom.js";

let heat = null;         // index into the temperatures, once the slider has been moved

export function likelyPanel(view) {
  const { temperatures } = view.run.likely;
  const one = temperatures.indexOf(1);
  const list = el("ol", { class: "bars" });
  const note = el("p", { class: "note" });
  const label = el("output", { for: "heat" });
  const slider = el("input", {
    id: "heat", type: "range", min: "0", max: String(temperatures.length - 1), value: String(heat ?? one),
    on: { input: () => { heat = Number(slider.value); update(); } },
  });

  function update() {
    const { run } = view;
    const at = heat ?? one;
    label.textContent = String(temperatures[at]);
    slider.setAttribute("aria-valuetext", String(temperatures[at]));
    const t = view.place();
    const top = run.top(t - 1, at);
    if (!top) {
      refill(list);
      note.textContent = "Of this place nothing was kept: with a large vocabulary only the last tokens are.";
      return;
    }
    const chosen = run.chosen(t, at);
    refill(list, ...top.map(({ id, share }) => el("li", { class: id === run.ids[t] ? "came" : "" },
      token(run.piece(id)), bar(share), el("span", { class: "number" }, percent(share)), id === run.ids[t] && el("span", { class: "unseen" }, "came"))));
    const rest = Math.max(0, 1 - top.reduce((sum, { share }) => sum + share, 0));
    const came = !chosen ? "" : chosen.rank >= top.length
      ? ` What came was number ${chosen.rank + 1}, with ${percent(chosen.share)}.` : ` What came was number ${chosen.rank + 1}.`;
    note.textContent = run.softAt(t) ? "A row of a picture or sound came, which is no token of the vocabulary: nothing was drawn at this place."
      : `All ${run.model.n_vocab - top.length} others together: ${percent(rest)}.${came}${settings(run)}`;
  }
  return {
    elements: [
      about("Every pass ends in a number for each token of the vocabulary; divided by the temperature and turned into probabilities, " +
        "one of them is drawn. Cold makes the first ones win, hot evens them out.", "refimpl/decode/sampling.py"),
      el("div", { class: "control" }, el("label", { for: "heat" }, "Temperature"), slider, label), list, note, legend(),
    ],
    update,
  };
}

function settings(run) {
  const sampling = run.written.sampling;
  if (!sampling) return "";
  if (sampling.temperature === 0) return " This text was written greedily: the first one always wins.";
  const min = sampling.min_p ? `, min-p ${sampling.min_p}` : "";
  return ` This text was drawn at temperature ${sampling.temperature}, top-k ${sampling.top_k}, top-p ${sampling.top_p}${min}.`;
}

function legend() {
  const steps = [["s1", "90 % and more"], ["s2", "50 to 90"], ["s3", "20 to 50"], ["s4", "5 to 20"], ["s5", "less: a surprise"]];
  return el("p", { class: "legend" }, "In the text: ", ...steps.map(([name, text]) => el("span", { class: `tok ${name}` }, text)),
    el("span", { class: "tok drafted" }, "drafted and accepted"));
}
