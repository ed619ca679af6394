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
      about("A quantized weight is a small whole number times a scale that its neighbours share. These are the bytes of the model's file; " +
        "what each bit is for was found by flipping it and asking the reference which weights change.",
      "refimpl/formats/quants/blocks.py", "refimpl/lab/glass/anatomy.py"),
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
  tell(Math.max(0, found.bits.findIndex((runs) => runs.some(([, , role]) => role === "code"))));
}

// Sentences about one byte.
function meaning(found, i, field) {
  const value = found.bytes[i], bits = value.toString(2).padStart(8, "0");
  const parts = [`Byte ${i} is part of ${field.name}: `, el("code", {}, `${bits.slice(0, 4)} ${bits.slice(4)}`)];
  for (const [low, n, role, ...about] of found.bits[i]) {
    const which = n === 8 ? "all bits" : n === 4 ? `${low ? "high" : "low"} nibble` : n === 1 ? `bit ${low}` : `bits ${low} to ${low + n - 1}`;
    parts.push(el("br"), `${which} (${bits.slice(8 - low - n, 8 - low)}): `, ...bitsMean(found, role, about, n, field));
  }
  return parts;
}

function bitsMean(found, role, about, n, field) {
  if (role === "field") return [`with ${field.n_bytes > 2 ? "their" : "its"} neighbour${field.n_bytes > 2 ? "s" : ""} a float${8 * field.n_bytes}, ${field.values[0]}`];
  if (role === "none") return ["not used for any weight"];
  if (role === "shared") return [`one of those that choose weight${about[0].length > 1 ? "s" : ""} ${about[0].join(", ")}`];
  if (role === "scale") return [`a part of the scale of weights ${about[0]} to ${about[1] - 1}${stepSaid(found, about[0])}`];
  if (role === "minimum") return [`a part of what is added to weights ${about[0]} to ${about[1] - 1}${found.parts ? `: ${short(partAt(found, about[0])[2])}` : ""}`];
  const [weight, place, length] = about;
  const code = found.codes[weight], [, step, added] = partAt(found, weight);
  const number = code < 0 || length === 8 ? "signed number" : "number";
  const whole = n === length ? `the ${number} ` : `${place ? "upper" : "lower"} bits of a ${number} of ${length} bits, `;
  const steps = found.levels ? found.levels[code] : code + found.offset;
  const became = found.levels ? ", for which the type's table has " : found.offset ? `, minus ${-found.offset} is ` : ", ";
  return [`${whole}${code}${found.levels || found.offset ? became : ""}`, found.levels || found.offset ? el("strong", {}, String(steps)) : "",
    `; times ${short(step)}${added ? `, ${added < 0 ? "minus" : "plus"} ${short(Math.abs(added))}` : ""} is weight ${weight}: `, el("strong", {}, String(found.weights[weight]))];
}

// [end, step, added] of the run that a weight is in.
function partAt(found, weight) {
  return found.parts.find(([end]) => weight < end);
}

function stepSaid(found, weight) {
  return found.parts ? `, whose step is ${short(partAt(found, weight)[1])}` : "";
}

function short(number) {
  return String(Number(number.toPrecision(6)));
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
