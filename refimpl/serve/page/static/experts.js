// Which experts each layer chose, how sure its router was, and a heat map that fills as the text grows.

import { about } from "./about.js";
import { bar, canvas, colour, el, percent, refill } from "./dom.js";

const ROW = 14;
const LEFT = 30;

export function expertsPanel(view) {
  const { run } = view;                        // the shape of all records of this model
  if (!run.experts.length) {
    return { elements: [about("This model has no experts: every token goes through all weights.", "refimpl/model/gemma4.py")], update() {} };
  }
  const n = Math.max(...run.experts.map((one) => one.n_expert));
  const used = run.experts.map((one) => one.ids.shape[1])[0];
  const width = view.width();
  const cell = Math.max(1, Math.floor((width - LEFT) / n));
  const label = "Heat map: a row for each layer, a column for each expert; the brighter, the more tokens it has read";
  const [map, context] = canvas(LEFT + cell * n, ROW * run.experts.length, label);
  const list = el("ul", { class: "layers" });
  const pointed = el("p", { class: "hint pointed" }, "Point at a cell to see whose it is.");
  map.addEventListener("pointermove", (event) => {
    const one = run.experts[Math.floor(event.offsetY / ROW)];
    const e = Math.floor((event.offsetX - LEFT) / cell);
    if (!one || e < 0 || e >= one.n_expert) return;
    pointed.textContent = `Layer ${one.layer}, expert ${e}: has read ${counts[run.experts.indexOf(one)][e]} of the ${upTo} tokens so far.`;
  });
  const counts = run.experts.map((one) => new Array(one.n_expert).fill(0));
  let upTo = 0;                                // tokens that are counted
  const note = el("p", { class: "note" });

  // From one place to another only what lies between them is counted.
  function count(end) {
    const [first, last, step] = end > upTo ? [upTo, end, 1] : [end, upTo, -1];
    view.run.experts.forEach(({ ids }, i) => {
      for (let at = first * ids.shape[1]; at < last * ids.shape[1]; at++) counts[i][ids.values[at]] += step;
    });
    upTo = end;
  }

  function update() {
    const row = view.place() - 1;
    count(row + 1);
    draw(row);
    const never = counts.map((each) => each.filter((c) => c === 0).length);
    const all = run.experts.reduce((sum, one) => sum + one.n_expert, 0);
    const idle = never.reduce((a, b) => a + b, 0);
    note.textContent = `After ${row + 1} tokens: ${idle} of ${all} experts have never been used (${percent(idle / all)}); ` +
      `fewest unused in a layer ${Math.min(...never)}, most ${Math.max(...never)}.`;
    refill(list, ...view.run.experts.map((one) => layerItem(view.run, one, row)));
  }

  function draw(row) {
    context.clearRect(0, 0, map.width, map.height);
    const cold = colour("--cold-cell"), hot = colour("--hot-cell"), ink = colour("--ink"), mark = colour("--mark");
    context.font = "10px system-ui, sans-serif";
    counts.forEach((each, i) => {
      const y = i * ROW;
      context.globalAlpha = 1;
      context.fillStyle = ink;
      context.fillText(String(run.experts[i].layer), 4, y + ROW - 4);
      context.fillStyle = cold;
      context.fillRect(LEFT, y, cell * run.experts[i].n_expert, ROW - 2);
      const most = Math.max(1, ...each);
      context.fillStyle = hot;
      each.forEach((c, e) => {
        if (!c) return;
        context.globalAlpha = 0.15 + 0.85 * Math.sqrt(c / most);
        context.fillRect(LEFT + e * cell, y, cell, ROW - 2);
      });
      context.globalAlpha = 1;
      context.fillStyle = mark;
      for (const [e] of view.run.chosenExperts(view.run.experts[i], row)) context.fillRect(LEFT + e * cell, y + ROW - 5, Math.max(2, cell - 1), 3);
    });
  }
  return {
    elements: [
      about(`In each layer a router gives all ${n} experts a probability, and only the ${used} likeliest read the token. The map counts ` +
        "who has read how many tokens so far; the marks below are the choice for this one. Play fills it.",
      "refimpl/reference/moe.py", "refimpl/model/gemma4.py"),
      el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Experts used so far" }, map), pointed, note,
      el("h3", {}, "The choice for this token"),
      el("p", { class: "hint" }, "The bar is the probability of all chosen experts together: long where the router was sure."), list,
    ],
    update,
  };
}

function layerItem(run, one, row) {
  const chosen = run.chosenExperts(one, row);
  const sum = chosen.reduce((total, [, share]) => total + share, 0);
  return el("li", {}, el("span", { class: "which-layer" }, `layer ${one.layer}`), bar(sum), el("span", { class: "number" }, percent(sum)),
    el("span", { class: "names" }, chosen.map(([e, share]) => `${e} (${Math.round(100 * share)} %)`).join(", ")));
}
