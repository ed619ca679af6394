// Whom the token attended to: a sliding layer and a full one side by side, head by head; the main text is shaded by the one chosen.

import { about } from "./about.js";
import { canvas, colour, el, percent, refill } from "./dom.js";
import { tokenAt } from "./tokens.js";

const LANE = 11;
const LEFT_OF = 22;
const kept = { sliding: null, full: null, head: "-1", shaded: "full" };      // what was chosen last, while the page is open

export function attentionPanel(view) {
  const kinds = [["sliding", "Sliding window"], ["full", "Full"]];
  const sides = kinds.map(([kind, title]) => side(view, kind, title, update)).filter((each) => each !== null);
  if (!sides.some(({ kind }) => kind === kept.shaded)) kept.shaded = sides[0].kind;
  const heads = Math.max(...view.run.model.layers.map((layer) => layer.n_head));
  const head = choice("Head", kept.head, [["-1", "largest of all"], ...Array.from({ length: heads }, (_, n) => [String(n), String(n)])],
    (value) => { kept.head = value; update(); });
  const shaded = choice("Shade the text by", kept.shaded, sides.map(({ kind, title }) => [kind, `${title.toLowerCase()} layer`]),
    (value) => { kept.shaded = value; update(); });

  function update() {
    const { run } = view;
    for (const each of sides) each.update(view.place() - 1);
    const layer = Number(kept[kept.shaded]);
    view.shade(run.weights(layer, Number(kept.head) < run.model.layers[layer].n_head ? Number(kept.head) : -1, view.place() - 1));
  }
  return {
    elements: [
      about("Each head of a layer gives the tokens before this one weights that sum to 1, and takes the mean of what they offer. Most " +
        "layers see a window only, the full ones everything. Shown are the largest weights of each head.",
      "refimpl/reference/attention.py"),
      el("div", { class: "controls" }, head, shaded), el("div", { class: "sides" }, ...sides.map(({ box }) => box)),
    ],
    update,
  };
}

function choice(label, value, options, changed) {
  const select = el("select", { on: { change: () => changed(select.value) } },
    ...options.map(([name, text]) => el("option", { value: name, selected: name === value }, text)));
  return el("label", { class: "choice" }, `${label} `, select);
}

function side(view, kind, title, changed) {
  const layers = view.run.model.layers.map((layer, i) => [layer, i]).filter(([layer]) => layer.full === (kind === "full"));
  if (!layers.length) return null;
  if (kept[kind] === null || !layers.some(([, i]) => i === Number(kept[kind]))) kept[kind] = String(layers[layers.length - 1][1]);
  const pick = choice(`${title} layer`, kept[kind], layers.map(([, i]) => [String(i), String(i)]), (value) => { kept[kind] = value; changed(); });
  const figure = el("div", { class: "lanes" });
  const note = el("p", { class: "note" });
  const list = el("ol", { class: "looked" });

  function update(row) {
    const { run } = view;
    const i = Number(kept[kind]);
    const layer = run.model.layers[i];
    const [first, end] = run.sight(i, row);
    refill(figure, lanes(view, i, first, end, row));
    note.textContent = end > row + 1
      ? `It sees places ${first} to ${end - 1}: it is a row of a picture, whose rows see each other in sliding layers, the later ones too.`
      : layer.window ? `It sees places ${first} to ${row}: the latest ${layer.window} at most.` : `It sees all places, 0 to ${row}.`;
    if (layer.kv_from !== i) note.textContent += ` Its keys and values are those of layer ${layer.kv_from}.`;
    const shown = Number(kept.head) < layer.n_head ? Number(kept.head) : -1;
    const best = [...run.weights(i, shown, row)].sort((a, b) => b[1] - a[1]).slice(0, 5);
    refill(list, ...best.map(([at, weight]) => el("li", {}, tokenAt(run, at), ` place ${at} `, el("span", { class: "number" }, percent(weight)))));
  }
  return { kind, title, box: el("section", { class: "side", "aria-label": `${title} layer` }, pick, figure, note, list), update };
}

// A lane for each head, a column for each place.
function lanes(view, i, first, end, row) {
  const { run } = view;
  const layer = run.model.layers[i];
  const both = view.width() > 460 ? (view.width() - 16) / 2 : view.width();
  const width = Math.floor(both);
  const scale = (width - LEFT_OF) / run.length;
  const label = `Attention of layer ${i}: a lane for each of ${layer.n_head} heads, places ${first} to ${end - 1} from left to right`;
  const [drawn, context] = canvas(width, LANE * layer.n_head + 2, label);
  const ink = colour("--ink"), ground = colour("--cold-cell"), hot = colour("--look");
  context.font = "9px system-ui, sans-serif";
  for (let n = 0; n < layer.n_head; n++) {
    const y = n * LANE;
    context.globalAlpha = 1;
    context.fillStyle = ink;
    context.fillText(String(n), 2, y + LANE - 2);
    context.fillStyle = ground;
    context.fillRect(LEFT_OF + first * scale, y, Math.max(1, (end - first) * scale), LANE - 2);
    context.fillStyle = hot;
    for (const [at, weight] of run.weights(i, n, row)) {
      context.globalAlpha = Math.min(1, 0.15 + Math.sqrt(weight));
      context.fillRect(LEFT_OF + at * scale, y, Math.max(2, scale), LANE - 2);
    }
  }
  return drawn;
}
