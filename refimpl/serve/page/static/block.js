// A block of weights taken apart: bytes, nibbles, scale, weights; from the very file.

import { about } from "./about.js";
import { button, canvas, colour, el, refill } from "./dom.js";

const BAR = 64;
const spot = { tensor: null, row: 0, block: 0 };

export function blockPanel(view) {
  const { run, askBlock } = view;
  const box = el("div", { class: "block" });
  const failed = el("p", { class: "failed", role: "alert", hidden: true });
  const samples = run.blocks || [];
  const names = askBlock ? askBlock.tensors.map((tensor) => tensor.name) : samples.map((sample) => sample.name);
  const pick = el("select", { id: "tensor", on: { change: () => { Object.assign(spot, { tensor: pick.value, row: 0, block: 0 }); load(); } } },
    ...names.map((name) => el("option", { value: name }, name)));
  const row = number("Row", "row");
  const block = number("Block", "block");
  if (!names.includes(spot.tensor)) Object.assign(spot, { tensor: names[0], row: 0, block: 0 });
  pick.value = spot.tensor;

  function number(label, name) {
    const input = el("input", { type: "number", min: "0", value: String(spot[name]), on: { change: () => { spot[name] = Number(input.value); load(); } } });
    return { input, box: el("label", { class: "choice" }, `${label} `, input) };
  }

  let asked = 0;
  async function load() {
    const now = ++asked;
    failed.hidden = true;
    try {
      const found = askBlock ? await askBlock(spot.tensor, spot.row, spot.block) : samples.find((sample) => sample.name === spot.tensor);
      if (now !== asked) return;                 // something else was chosen meanwhile
      Object.assign(spot, { row: found.row, block: found.block });
      for (const [field, most] of [[row, found.rows], [block, found.blocks]]) field.input.max = String(most - 1);
      row.input.value = found.row;
      block.input.value = found.block;
      show(box, found);
    } catch (error) {
      if (now !== asked) return;
      failed.textContent = error.message;
      failed.hidden = false;
    }
  }
  if (names.length) load();
  return {
    elements: names.length ? [
      about("A quantized weight is a small whole number times a scale that its whole block shares. These are the bytes of the model's " +
        "file, and what they say.", "refimpl/formats/quants/blocks.py"),
      el("div", { class: "controls" }, el("label", { class: "choice" }, "Tensor ", pick), ...(askBlock ? [row.box, block.box] : [])), failed, box,
    ] : [about("This model's weights are plain numbers: there are no blocks to take apart.", "refimpl/formats/quants/blocks.py")],
    update() {},
  };
}

function show(box, found) {
  const which = el("p", { class: "now", "aria-live": "polite" });
  const owner = found.bytes.map((_, i) => found.fields.findIndex((field) => i >= field.first && i < field.first + field.n_bytes));
  const bytes = found.bytes.map((value, i) => button(value.toString(16).padStart(2, "0"), () => tell(i),
    { class: `byte f${owner[i] % 5}`, "aria-label": `byte ${i}, ${found.fields[owner[i]].name}: ${value}` }));
  function tell(i) {
    bytes.forEach((each, j) => each.classList.toggle("on", i === j));
    which.replaceChildren(...meaning(found, i, found.fields[owner[i]]));
  }
  refill(box,
    el("p", { class: "note" }, `${found.type}: ${found.bytes.length} bytes for ${found.weights.length} weights, ` +
      `${(8 * found.bytes.length / found.weights.length).toFixed(2)} bits each. Row ${found.row} of ${found.rows}, block ${found.block} of ${found.blocks}.`),
    el("ul", { class: "fields" }, ...found.fields.map((field, i) => el("li", {}, el("span", { class: `swatch f${i % 5}`, "aria-hidden": "true" }),
      `${field.name}: ${field.n_bytes} byte${field.n_bytes > 1 ? "s" : ""}${field.values.length === 1 ? `, ${field.dtype === "f2" ? "a float16, " : ""}${field.values[0]}` : ""}`))),
    el("div", { class: "bytes", role: "group", "aria-label": "Bytes" }, ...bytes), which, el("h3", {}, "Weights"), bars(found),
    el("details", {}, el("summary", {}, "All of them as numbers"), el("p", { class: "numbers" }, found.weights.join("  "))));
  tell(Math.max(0, owner.findIndex((i) => found.fields[i].name === "qs")));
}

// A sentence about one byte.
function meaning(found, i, field) {
  const value = found.bytes[i], bits = value.toString(2).padStart(8, "0");
  const parts = [`Byte ${i} is part of ${field.name}: `, el("code", {}, `${bits.slice(0, 4)} ${bits.slice(4)}`)];
  const d = found.fields.find((each) => each.name === "d");
  const j = i - field.first;
  if (found.type === "Q4_0" && field.name === "qs") {
    for (const [name, nibble, at] of [["low", value & 15, j], ["high", value >> 4, j + 16]]) {
      parts.push(el("br"), `${name} nibble ${nibble}, minus 8 is `, el("strong", {}, String(found.codes[at])),
        `; times ${d.values[0]} is weight ${at}: `, el("strong", {}, String(found.weights[at])));
    }
  } else if (found.type === "Q8_0" && field.name === "qs") {
    parts.push(el("br"), `as a signed number ${found.codes[j]}; times ${d.values[0]} is weight ${j}: `, el("strong", {}, String(found.weights[j])));
  } else if (field.dtype === "f2") {
    parts.push(el("br"), `with its neighbour a float16: ${field.values[0]}`);
  } else {
    parts.push(el("br"), `${value}; how ${found.type} uses it is drawn in `, el("code", {}, "refimpl/formats/quants/"));
  }
  return parts;
}

function bars(found) {
  const n = found.weights.length;
  const step = n > 64 ? 3 : 12;
  const most = Math.max(...found.weights.map(Math.abs)) || 1;
  const [drawn, context] = canvas(n * step, 2 * BAR, `The ${n} weights of the block, from ${Math.min(...found.weights)} to ${Math.max(...found.weights)}`);
  context.fillStyle = colour("--look");
  found.weights.forEach((weight, i) => {
    const height = Math.abs(weight) / most * (BAR - 2);
    context.fillRect(i * step, weight >= 0 ? BAR - height : BAR, step - 1, Math.max(1, height));
  });
  context.fillStyle = colour("--ink");
  context.fillRect(0, BAR, n * step, 1);
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Weights as bars" }, drawn);
}
