// What was read for a token: bytes of weights and of keys and values, time per part against the bandwidth, what came from the cache.

import { about } from "./about.js";
import { bar, el, refill, size } from "./dom.js";

export function readingPanel(view) {
  const bytes = el("tbody");
  const note = el("p", { class: "note" });
  const time = el("tbody");
  const timing = el("p", { class: "note" });

  function update() {
    const { run } = view;
    const { kv, bandwidth, file_bytes } = run.read;
    const parts = run.read.parts.map((part, i) => [part, run.read.weights[i], run.read.seconds[i]]).filter(([, n]) => n > 0);
    const total = parts.reduce((sum, [, n]) => sum + n, 0);
    const row = view.place() - 1;
    const seen = run.model.layers.map((_, i) => run.sight(i, row));
    const cache = seen.reduce((sum, [first, end], i) => sum + kv[i] * (end - first), 0);
    const all = [...parts, ["keys and values", cache]];
    const most = Math.max(...all.map(([, n]) => n));
    refill(bytes, ...all.map(([part, n]) => line(part, n / most, size(n), "")));
    const sum = parts.reduce((seconds, [, , took]) => seconds + took, 0);
    const longest = Math.max(...parts.map(([, , took]) => took));
    refill(time, ...parts.map(([part, n, took]) => line(part, took / longest, `${(took * 1e3).toPrecision(3)} ms`,
      bandwidth ? share(n / took / bandwidth) : "")));
    note.textContent = `${size(total + cache)} for this token: ${size(total)} of the file's ${size(file_bytes)}, and ${size(cache)} of keys and ` +
      `values of ${row + 1} places. ${reused(run)} The rest is norms, routers and ` +
      `${run.softAt(row) ? "no row of the embedding: this row came out of a tower." : "a row of the embedding."}`;
    timing.textContent = bandwidth
      ? `${(sum * 1e3).toPrecision(3)} ms in all, measured with the taps open. Memory gives ${size(bandwidth)} a second here; the last column says how ` +
        "much of that each part's weights took. A model that fits into the processor's cache can take more than all of it, and a small " +
        "one waits for other things than memory."
      : `${(sum * 1e3).toPrecision(3)} ms in all, by the reference, which is bound by NumPy and not by memory.`;
  }
  return {
    elements: [
      about("To write a token, its weights have to come out of memory once: that, more than arithmetic, decides how fast it goes. Of the " +
        "experts only the chosen ones are read.", "refimpl/lab/glass/reading.py"),
      note, table("Bytes read", bytes), table("Time of one more token", time), timing,
    ],
    update,
  };
}

function share(part) {
  return part >= 0.01 ? `${Math.round(100 * part)}\u202f% of memory` : "under 1\u202f% of memory";
}

function reused(run) {
  const n = run.written.reused;
  return n ? `${n} of the ${run.n_prompt} tokens of the prompt were known from before and not read again.`
    : `All ${run.n_prompt} tokens of the prompt had to be read.`;
}

function table(title, body) {
  return el("table", { class: "parts" }, el("caption", {}, title), body);
}

function line(part, part_share, text, more) {
  return el("tr", {}, el("th", { scope: "row" }, part), el("td", { class: "wide" }, bar(part_share)), el("td", { class: "number" }, text),
    more !== "" && el("td", { class: "number" }, more));
}
