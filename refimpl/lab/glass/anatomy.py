"""Which bits of a block make which of its weights: found by flipping each bit and asking the reference what has changed.

So no layout is written down here: the table of blocks says where fields are, the codecs what they mean.
"""

import functools
from dataclasses import dataclass

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, Block, fields_of
from refimpl.formats.quants.codecs import dequantize

PROBES = 8
SMALLEST = 16                   # weights that share a scale, at least; fewer that share bits are a vector out of a codebook
MINIMUMS = "m", "dmin"          # floats that are added, or multiply what is
ONE = {"MXFP4": 127, "NVFP4": 0x38}                     # whole numbers that stand for a scale of about 1


@dataclass(frozen=True)
class Anatomy:
    """A type's bits, counted from the lowest of byte 0.

    role        of every bit: "field" (of a float), "code" (of one weight), "scale", "minimum", "shared" (by a vector), "none"
    weights     of every bit: those that it changes; of scales and minimums all between the first and the last
    code_EB     bits of each weight's code, the lowest first; None where weights share bits, as in codebooks
    unit_B      what each of these bits adds to the code; the highest may be negative
    levels      what each code stands for; None where a code stands for itself plus `offset`
    """

    role: tuple[str, ...]
    weights: tuple[tuple[int, ...], ...]
    code_EB: np.ndarray | None
    unit_B: np.ndarray
    levels: tuple[float, ...] | None
    offset: float


@functools.cache
def anatomy(name: str) -> Anatomy:
    """That of a block type which can be dequantized."""
    kind = BLOCKS[name]
    owner = [(field, dtype) for field, dtype, count in kind.fields for _ in range(8 * np.dtype(dtype).itemsize * count)]
    raw_PN = _probes(kind, np.random.default_rng(1))
    bits_PM, n_bit = _bits(raw_PN), len(owner)
    flipped_PMM = np.repeat(bits_PM[:, None], n_bit, axis=1)
    flipped_PMM[:, np.arange(n_bit), np.arange(n_bit)] ^= 1
    before_P1E, after_PME = _weights(kind, bits_PM)[:, None], _weights(kind, flipped_PMM)
    change_PME = after_PME - before_P1E
    changed_ME = (after_PME.view(np.uint32) != before_P1E.view(np.uint32)).any(axis=0)
    role, weights = [], []
    for bit, (_, dtype) in enumerate(owner):
        found = np.flatnonzero(changed_ME[bit])
        if dtype.startswith("<f") or not len(found):
            role.append("field" if dtype.startswith("<f") else "none")
            weights.append(())
        elif len(found) < SMALLEST:
            role.append("code" if len(found) == 1 else "shared")
            weights.append(tuple(found.tolist()))
        else:
            span = slice(found[0], found[-1] + 1)
            role.append("minimum" if np.ptp(change_PME[:, bit, span], axis=-1).max() == 0 else "scale")
            weights.append(tuple(range(span.start, span.stop)))
    weights = _vectors(role, weights)
    code_EB = _codes(kind, role, weights)
    if code_EB is None:
        return Anatomy(tuple(role), tuple(weights), None, np.zeros(0, int), None, 0.0)
    return Anatomy(tuple(role), tuple(weights), *_meaning(kind, tuple(role), code_EB, bits_PM))


def explained(name: str, raw: np.ndarray) -> dict[str, object]:
    """One block, uint8 (n_bytes,): `bits`, for every byte its runs of bits as [lowest, how many, role, ...]; where every weight has a code
    of its own `codes`, `offset`, `levels` and `parts`, runs of weights as [end, step, added].

    A weight is (code + offset) * step + added, or levels[code] * step, to the last bit of float32. What follows the role is, of a code, the
    weight, the first bit's place in the code and the code's length; of scales and minimums the first weight and the one behind the last;
    of what is shared the weights.
    """
    found = anatomy(name)
    told: dict[str, object] = {"bits": [_runs(found, 8 * i) for i in range(len(raw))]}
    if found.code_EB is None:
        return told
    bits_M, kind = _bits(raw), BLOCKS[name]
    code_E = bits_M[found.code_EB] @ found.unit_B
    none_M, plain_M, step_M = _at_codes(kind, found.role, found.code_EB, bits_M, 0 if found.levels is None else found.levels.index(1.0))
    at_none_E, at_plain_E, at_step_E = _weights(kind, np.stack([none_M, plain_M, step_M]))
    step_E = at_step_E - at_plain_E if found.levels is None else at_step_E
    added_E = at_none_E - at_plain_E if found.levels is None else np.zeros_like(step_E)
    ends = [*(np.flatnonzero((np.diff(step_E) != 0) | (np.diff(added_E) != 0)) + 1).tolist(), len(step_E)]
    return told | {"codes": code_E.tolist(), "offset": found.offset, "levels": found.levels,
                   "parts": [[end, float(step_E[end - 1]), float(added_E[end - 1])] for end in ends]}


def _probes(kind: Block, random: np.random.Generator) -> np.ndarray:
    """Random blocks whose floats are 1, uint8 (PROBES, n_bytes)."""
    raw_PN = random.integers(0, 256, (PROBES, kind.n_bytes), np.uint8)
    records = fields_of(raw_PN, kind)
    for field, dtype, _ in kind.fields:
        if dtype.startswith("<f"):
            records[field] = 1
        elif kind.name in ONE and field in ("e", "d"):
            records[field] = ONE[kind.name]
    return raw_PN


def _bits(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=-1, bitorder="little")


def _weights(kind: Block, bits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):                     # a flipped bit may make an infinite scale
        return dequantize(np.packbits(bits, axis=-1, bitorder="little"), kind.name)


def _vectors(role: list[str], weights: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The same with whole vectors where bits are shared: a bit may happen to change some of its weights only."""
    vector: dict[int, set[int]] = {}
    for its in (its for kind_of_bit, its in zip(role, weights) if kind_of_bit == "shared"):
        whole = set(its).union(*(vector.get(w, ()) for w in its))
        vector |= dict.fromkeys(whole, whole)
    return [tuple(sorted(vector[its[0]])) if kind_of_bit == "shared" else its for kind_of_bit, its in zip(role, weights)]


def _codes(kind: Block, role: list[str], weights: list[tuple[int, ...]]) -> np.ndarray | None:
    """The bits of each weight's code, (E, B) in the order of the block; None where weights share some, or have not equally many."""
    own: list[list[int]] = [[] for _ in range(kind.elements)]
    for bit, (kind_of_bit, its) in enumerate(zip(role, weights)):
        if kind_of_bit == "code":
            own[its[0]].append(bit)
    return np.array(own) if "shared" not in role and len({len(each) for each in own}) == 1 and own[0] else None


def _meaning(kind: Block, role: tuple[str, ...], code_EB: np.ndarray, bits_PM: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray, tuple[float, ...] | None, float]:
    """(code_EB with the lowest bit first, unit_B, levels, offset): weight 0 at each of its codes, in the probe that scales it most."""
    n = code_EB.shape[1]
    code_CB = np.arange(2 ** n)[:, None] >> np.arange(n) & 1
    bits_PCM = np.repeat(_without_minimum(kind, role, bits_PM)[:, None], 2 ** n, axis=1)
    bits_PCM[..., code_EB[0]] = code_CB
    w_PC = _weights(kind, bits_PCM)[..., 0].astype(np.float64)
    w_C = w_PC[np.argmax(np.ptp(w_PC, axis=-1))]
    delta_B = w_C[1 << np.arange(n)] - w_C[0]
    unit = delta_B[np.argmin(np.abs(delta_B))]
    if np.array_equal(w_C, w_C[0] + code_CB @ delta_B):
        order = np.argsort(np.abs(delta_B), kind="stable")
        return code_EB[:, order], np.rint(delta_B[order] / unit).astype(int), None, float(w_C[0] / unit)
    least = min((w for w in w_C.tolist() if w), key=abs)
    return code_EB, 1 << np.arange(n), tuple((w_C / least).tolist()), 0.0


def _without_minimum(kind: Block, role: tuple[str, ...], bits: np.ndarray) -> np.ndarray:
    bits = np.where(np.array(role) == "minimum", np.uint8(0), bits)
    raw = np.packbits(bits, axis=-1, bitorder="little")
    for field in MINIMUMS:
        if field in (name for name, _, _ in kind.fields):
            fields_of(raw, kind)[field] = 0
    return _bits(raw)


def _at_codes(kind: Block, role: tuple[str, ...], code_EB: np.ndarray, bits_M: np.ndarray, level: int) -> tuple[np.ndarray, ...]:
    """A block's bits with every code 0; without minimums; without them and every code that of one step."""
    none_M = bits_M.copy()
    none_M[code_EB] = 0
    step_M = (plain_M := _without_minimum(kind, role, none_M)).copy()
    code = level or 1
    for b in range(code_EB.shape[1]):
        step_M[code_EB[:, b]] = code >> b & 1
    return none_M, plain_M, step_M


def _runs(found: Anatomy, first: int) -> list[list[object]]:
    """The bits of a byte, those together that belong to the same."""
    runs: list[list[object]] = []
    for bit in range(first, first + 8):
        role, its = found.role[bit], found.weights[bit]
        about: list[object] = [role]
        if role == "code" and found.code_EB is not None:
            place = found.code_EB[its[0]].tolist().index(bit)
            about += [its[0], place, found.code_EB.shape[1]]
            if runs and runs[-1][2:4] == about[:2] and runs[-1][4] + runs[-1][1] == place:
                runs[-1][1] += 1
                continue
        elif role in ("scale", "minimum"):
            about += [its[0], its[-1] + 1]
        elif role in ("code", "shared"):
            about = ["shared", list(its)]
        if runs and runs[-1][2:] == about:
            runs[-1][1] += 1
        else:
            runs.append([bit - first, 1, *about])
    return runs
