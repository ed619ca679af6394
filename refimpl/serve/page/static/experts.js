// Which experts each layer chose, how sure its router was, and a heat map that fills as the text grows.

import { about } from "./about.js";
import { bar, canvas, colour, el, percent, refill } from "./dom.js";

const ROW = 14;
const LEFT = 30;

export function expertsPanel(view) {
  const { run } = view;
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
    const row = view.place() - 1;
    pointed.textContent = `Layer ${one.layer}, expert ${e}: has read ${counted(one, row)[e]} of the ${row + 1} tokens so far.`;
  });
  const note = el("p", { class: "note" });

  function update() {
    const row = view.place() - 1;
    const counts = run.experts.map((one) => counted(one, row));
    draw(counts, row);
    const never = counts.map((count) => count.filter((c) => c === 0).length);
    const all = run.experts.reduce((sum, one) => sum + one.n_expert, 0);
    const idle = never.reduce((a, b) => a + b, 0);
    note.textContent = `After ${row + 1} tokens: ${idle} of ${all} experts have never been used (${percent(idle / all)}); ` +
      `fewest unused in a layer ${Math.min(...never)}, most ${Math.max(...never)}.`;
    refill(list, ...run.experts.map((one) => layerItem(run, one, row)));
  }

  function draw(counts, row) {
    context.clearRect(0, 0, map.width, map.height);
    const cold = colour("--cold-cell"), hot = colour("--hot-cell"), ink = colour("--ink"), mark = colour("--mark");
    context.font = "10px system-ui, sans-serif";
    counts.forEach((count, i) => {
      const y = i * ROW;
      context.globalAlpha = 1;
      context.fillStyle = ink;
      context.fillText(String(run.experts[i].layer), 4, y + ROW - 4);
      context.fillStyle = cold;
      context.fillRect(LEFT, y, cell * run.experts[i].n_expert, ROW - 2);
      const most = Math.max(1, ...count);
      context.fillStyle = hot;
      count.forEach((c, e) => {
        if (!c) return;
        context.globalAlpha = 0.15 + 0.85 * Math.sqrt(c / most);
        context.fillRect(LEFT + e * cell, y, cell, ROW - 2);
      });
      context.globalAlpha = 1;
      context.fillStyle = mark;
      for (const [e] of run.chosenExperts(run.experts[i], row)) context.fillRect(LEFT + e * cell, y + ROW - 5, Math.max(2, cell - 1), 3);
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

function counted(one, row) {
  const count = new Array(one.n_expert).fill(0);
  const end = (row + 1) * one.ids.shape[1];
  for (let i = 0; i < end; i++) count[one.ids.values[i]]++;
  return count;
}

function layerItem(run, one, row) {
  const chosen = run.chosenExperts(one, row);
  const sum = chosen.reduce((total, [, share]) => total + share, 0);
  return el("li", {}, el("span", { class: "which-layer" }, `layer ${one.layer}`), bar(sum), el("span", { class: "number" }, percent(sum)),
    el("span", { class: "names" }, chosen.map(([e, share]) => `${e} (${Math.round(100 * share)} %)`).join(", ")));
}
