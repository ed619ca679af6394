// The logit lens: what each layer would have said.

import { about } from "./about.js";
import { el, percent, refill, token } from "./dom.js";

export function lensPanel(view) {
  const body = el("tbody");
  const note = el("p", { class: "note" });

  function update() {
    const { run } = view;
    const t = view.place();
    const said = run.said(t - 1);
    if (!said) {
      refill(body);
      note.textContent = `Kept from place ${run.lens.first + 1} on: each layer's answer costs as much as the model's own.`;
      return;
    }
    const last = said[said.length - 1][1][0][0];
    let settled = said.length - 1;
    while (settled > 0 && said[settled - 1][1][0][0] === last) settled--;
    refill(body, ...said.slice().reverse().map(([layer, top], n) => el("tr", { class: said.length - 1 - n >= settled ? "settled" : "" },
      el("th", { scope: "row" }, String(layer)),
      ...top.map(([id, share]) => {
        const cell = el("td", {}, token(run.piece(id)), el("span", { class: "number" }, ` ${percent(share)}`));
        cell.style.backgroundColor = `color-mix(in srgb, var(--warm) ${Math.round(45 * share)}%, transparent)`;
        return cell;
      }))));
    const layer = said[settled][0];
    note.textContent = `From layer ${layer} on, the first choice is what the model says in the end.`;
  }
  return {
    elements: [
      about("The state behind each layer goes through the last norm and the head, as if that layer were the last one. The lower layers " +
        "were not trained to speak, so what they say is a hint, not a thought.", "refimpl/lab/glass/lens.py", "refimpl/model/gemma4.py"),
      note,
      el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Layers, the last one first" },
        el("table", { class: "lens" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), el("th", { scope: "col" }, "first"),
          el("th", { scope: "col" }, "second"), el("th", { scope: "col" }, "third"))), body)),
    ],
    update,
  };
}
