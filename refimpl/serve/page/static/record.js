// A record (refimpl/lab/glass/record.py) ready to use: arrays out of base64, and questions that several panels ask.

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
const FRACTION = 65535;

// An array is decoded when it is first asked for: most of a record belongs to panels that nobody opens.
function unpacked({ type, shape, data }) {
  let values = null;
  return { shape, get values() { return values ??= decodedArray(type, data); } };
}

function decodedArray(type, data) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[type](bytes.buffer);
}

export class Run {
  constructor(record) {
    if (record.format !== "refimpl glass 1") throw new Error(`this page cannot read a record of the form ${record.format}`);
    Object.assign(this, record);
    const likely = record.likely;
    this.likely = { first: likely.first, temperatures: likely.temperatures };
    for (const name of ["ids", "logits", "chosen", "rank", "log_sums"]) this.likely[name] = unpacked(likely[name]);
    this.lens = { ...record.lens, ids: unpacked(record.lens.ids), chance: unpacked(record.lens.chance) };
    this.experts = record.experts.map((one) => ({ ...one, ids: unpacked(one.ids), chance: unpacked(one.chance) }));
    this.attention = record.attention.map((one) => ({ at: unpacked(one.at), weight: unpacked(one.weight) }));
    this.written = record.written || { rounds: [], reused: 0, sampling: null };
    this.length = record.ids.length;
    this.roundOf = new Map();
    this.written.rounds.forEach((round, n) => {
      for (let i = 0; i < round.emitted && round.at + i < this.length; i++) this.roundOf.set(round.at + i, [n, i]);
    });
  }

  // Is this the record of a text that begins like `other`'s, with the same prompt?
  continues(other) {
    return this.n_prompt === other.n_prompt && this.length >= other.length && other.ids.every((id, t) => id === this.ids[t]);
  }

  text(t) {
    return this.texts[t] || this.pieces[this.ids[t]] || "";
  }

  // The picture or sound that a place is a row of: { first, n, together }; undefined where a token stands.
  softAt(t) {
    return this.ids[t] < 0 ? this.soft.find(({ first, n }) => t >= first && t < first + n) : undefined;
  }

  // [first, end) of what the row at a place sees in a layer. In sliding layers rows of a picture may see all of it.
  sight(layer, row) {
    const { window } = this.model.layers[layer];
    const part = window ? this.softAt(row) : undefined;
    return [window ? Math.max(0, row - window + 1) : 0, part?.together ? part.first + part.n : row + 1];
  }

  piece(id) {
    return this.pieces[id] ?? `token ${id}`;
  }

  // How probable each of the ten likeliest tokens behind place `row` is: at which temperature is an index into likely.temperatures.
  top(row, temperature) {
    const { first, temperatures, ids, logits, log_sums } = this.likely;
    const at = row - first;
    const n = ids.shape[1];
    if (at < 0 || at >= ids.shape[0]) return null;
    const sum = log_sums.values[at * temperatures.length + temperature];
    return Array.from({ length: n }, (_, k) => ({
      id: ids.values[at * n + k],
      share: Math.exp(logits.values[at * n + k] / temperatures[temperature] - sum),
    }));
  }

  // The probability of the token that came, and how many were likelier; null where it was not recorded.
  chosen(t, temperature = this.likely.temperatures.indexOf(1)) {
    const at = t - 1 - this.likely.first;
    const { temperatures, chosen, rank, log_sums } = this.likely;
    if (at < 0 || this.ids[t] < 0) return null;
    const sum = log_sums.values[at * temperatures.length + temperature];
    return { share: Math.exp(chosen.values[at] / temperatures[temperature] - sum), rank: rank.values[at] };
  }

  // [expert, probability] of one layer's choice at a place.
  chosenExperts(one, row) {
    const n = one.ids.shape[1];
    return Array.from({ length: n }, (_, k) => [one.ids.values[row * n + k], one.chance.values[row * n + k] / FRACTION]);
  }

  // position -> weight at a place, of one head, or the largest of all (head -1).
  weights(layer, head, row) {
    const { at, weight } = this.attention[layer];
    const [, heads, k] = at.shape;
    const found = new Map();
    for (let n = head < 0 ? 0 : head; n < (head < 0 ? heads : head + 1); n++) {
      for (let i = 0; i < k; i++) {
        const place = (row * heads + n) * k + i;
        const share = weight.values[place] / FRACTION;
        if (share > (found.get(at.values[place]) || 0)) found.set(at.values[place], share);
      }
    }
    return found;
  }

  // What each layer of the lens would have said at a place: [layer, [[id, probability], ...]].
  said(row) {
    const { layers, first, ids, chance } = this.lens;
    const [, n, k] = ids.shape;
    if (row < first) return null;
    return layers.map((layer, i) => [layer, Array.from({ length: k }, (_, j) => {
      const place = (i * n + row - first) * k + j;
      return [ids.values[place], chance.values[place] / FRACTION];
    })]);
  }
}
