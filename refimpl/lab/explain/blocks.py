"""Notebook 1: which weight, scale or minimum every bit of a block belongs to; pictures of blocks, and of all types side by side."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS
from refimpl.lab.explain.quant_table import Row
from refimpl.lab.explain.show import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, figure, legend, picture


def bit_owners(type_name: str) -> list[list[str]]:
    """For each byte of a block, what bits 7 .. 0 belong to: "d", "dmin", "s3" (scale of a sub-block), "m3" (its minimum), "q17" (weight).

    For Q4_0 and Q4_K; see the diagrams in their modules. Raises ValueError for other types.
    """
    if type_name == "Q4_0":
        return _whole("d", 2) + [_nibbles(j + 16, j) for j in range(16)]
    if type_name == "Q4_K":
        scales = [[f"{k}{i + 4}"] * 2 + [f"{k}{i}"] * 6 for k in "sm" for i in range(4)]
        scales += [[f"m{i + 4}"] * 4 + [f"s{i + 4}"] * 4 for i in range(4)]
        return _whole("d", 2) + _whole("dmin", 2) + scales + [_nibbles(64 * g + j + 32, 64 * g + j) for g in range(4) for j in range(32)]
    raise ValueError(f"the bits of {type_name} are not written down here; those of Q4_0 and Q4_K are")


def _whole(name: str, n_bytes: int) -> list[list[str]]:
    return [[name] * 8 for _ in range(n_bytes)]


def _nibbles(high: int, low: int) -> list[str]:
    return [f"q{high}"] * 4 + [f"q{low}"] * 4


def bits_of_block(raw: np.ndarray) -> np.ndarray:
    """uint8 (n_bytes,) -> its bits, 7 .. 0 of each byte, uint8 (n_bytes, 8)."""
    return np.unpackbits(raw[:, None], axis=1)


def number_of(raw: np.ndarray, type_name: str, owner: str) -> int:
    """The unsigned integer that the bits of `owner` make in one block. The float16 scales of more than a byte are not read this way.

    In Q4_K the upper two bits of s4 .. m7 stand before the lower four.
    """
    if raw.shape != (BLOCKS[type_name].n_bytes,):
        raise ValueError(f"{type_name}: expected one block of {BLOCKS[type_name].n_bytes} bytes, got shape {raw.shape}")
    bits, value = bits_of_block(raw), 0
    for b, owners in enumerate(bit_owners(type_name)):
        for bit, own in zip(bits[b], owners):
            if own == owner:
                value = 2 * value + int(bit)
    return value


# ---- pictures

FILL = {"d": "#F2B199", "dmin": "#F5D491", "s": "#9ED9C5", "m": "#E6C3DA"}      # light, under black digits
NIBBLES = ("#A5CBE5", "#CFE6F5")                                                # of weights: high, low
MEANING = {"d": "d, a float16", "dmin": "dmin, a float16", "s": "s, scales of sub-blocks", "m": "m, minimums of sub-blocks"}
FAMILIES = {    # colour, marker, and which types
    "plain floats": (BLACK, "s", ("F16", "BF16")),
    "one scale": (BLUE, "o", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_K", "Q1_0", "Q2_0")),
    "K: scales of scales": (GREEN, "D", ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")),
    "I: uneven values": (SKY, "v", ("IQ4_NL", "IQ4_XS")),
    "I: codebooks": (RED, "^", ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")),
    "4-bit floats": (PINK, "P", ("MXFP4", "NVFP4")),
    "ternary": (ORANGE, "X", ("TQ1_0", "TQ2_0")),
}


def bits_picture(raw: np.ndarray, type_name: str, shown: Sequence[int], per_line: int, marked: Collection[str] = ()):
    """The bytes `shown` of a block bit by bit, `per_line` bytes in a line, coloured by what a bit belongs to; `marked` owners outlined.

    raw: uint8 (bytes of a block,). The names are those of `bit_owners`.
    """
    from matplotlib.patches import Rectangle

    owners, bits = bit_owners(type_name), bits_of_block(raw)
    n_lines = math.ceil(len(shown) / per_line)
    fig, axes = figure(1.35 * per_line + 0.6, 0.5 * n_lines + 0.45)
    axes.set(xlim=(-0.9, 8.6 * per_line), ylim=(n_lines + 0.05, -0.75))
    axes.axis("off")
    seen = {}
    for place, b in enumerate(shown):
        line, left = place // per_line, 8.6 * (place % per_line)
        axes.text(left + 4, line + 0.08, f"byte {b}", fontsize=6, ha="center", va="bottom", color="0.4")
        for i in range(8):
            own = owners[b][i]
            kind = own.rstrip("0123456789")
            colour = NIBBLES[i // 4] if kind == "q" else FILL[kind]
            seen.setdefault(MEANING.get(kind) or f"q, weights in {('high', 'low')[i // 4]} nibbles", colour)
            strong = own in marked
            axes.add_patch(Rectangle((left + i, line + 0.12), 1, 0.62, facecolor=colour, edgecolor="black" if strong else "white",
                                     lw=1.4 if strong else 0.5, zorder=3 if strong else 2))
            axes.text(left + i + 0.5, line + 0.44, str(bits[b, i]), fontsize=7, ha="center", va="center", zorder=4, family="monospace",
                      weight="bold" if strong else "normal")
        for i in (0, 4):
            if owners[b][i].startswith("q"):
                axes.text(left + i + 2, line + 0.77, owners[b][i], fontsize=5.5, ha="center", va="top", color="0.3")
    for n, (meaning, colour) in enumerate(seen.items()):
        x = n * 8.6 * per_line / len(seen)
        axes.add_patch(Rectangle((x, -0.7), 0.8, 0.35, facecolor=colour, lw=0))
        axes.text(x + 1.1, -0.52, meaning, fontsize=7, va="center")
    return picture(fig, f"Bytes of a block of {type_name}, bit by bit, coloured by field.")


def weights_picture(x: np.ndarray, restored: np.ndarray, values: np.ndarray, title: str):
    """Weights before (dots) and after (dashes), float32 (n,) each, over the values that codes can take, (n_parts, n_codes)."""
    fig, axes = figure(9, 3)
    part, place = len(x) // len(values), np.arange(len(x))
    for p, row in enumerate(values):
        axes.hlines(row, part * p - 0.5, part * (p + 1) - 0.5, color="0.85", lw=0.8, zorder=1)
    axes.hlines(restored, place - 0.45, place + 0.45, color=BLUE, lw=2.2, label="after", zorder=2)
    axes.plot(place, x, ".", color=RED, ms=5, label="before", zorder=3)
    axes.set(title=title, xlabel="weight of the block", xlim=(-1, len(x)))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return picture(fig, f"{title}: weights before and after, over the values its codes can take.")


def error_picture(table: Sequence[Row]):
    """Relative error on normal weights against bits a weight, every type of less than 9 a point; dashed, what no code can beat."""
    shown = [row for row in table if row.best_normal > 0 and row.bits < 9]
    fig, axes = figure(9, 6.5)
    bits = np.array([1, 9])
    axes.plot(bits, 2.0**-bits, color="0.5", lw=1, ls="--", label="least possible for normal weights, $2^{-bits}$")
    axes.set(yscale="log", xlabel="bits a weight (in the file)", ylabel="error, relative to the weights", xlim=(0.8, 9), ylim=(3e-3, 1.1))
    _points(axes, shown, [(row.bits, row.best_normal) for row in shown])
    legend(axes, loc="lower left")
    return picture(fig, "Error of every block type against its bits a weight, on logarithmic axes.")


def speed_picture(table: Sequence[Row]):
    """Error on normal weights against 10**9 weights that one thread of ggml multiplies in a second."""
    return _error_against({row: row.ggml_speed for row in table}, "$10^9$ weights a second, one thread, out of the cache", "lower left",
                          "Error of every block type against the speed of its arithmetic in ggml.")


def kernels_picture(table: Sequence[Row]):
    """Error on normal weights against the speed of decoding with this package's kernels."""
    return _error_against({row: row.decode for row in table}, "weights a second when decoding, Q4_0 = 1", "upper left",
                          "Error of the block types with kernels against the speed of decoding with them.")


def _error_against(speeds: Mapping[Row, float], label: str, corner: str, description: str):
    """Error on normal weights against a speed: types of less than 9 bits for which there is one."""
    shown = {row: speed for row, speed in speeds.items() if speed > 0 and row.bits < 9}
    fig, axes = figure(9, 4.5)
    axes.set(yscale="log", xlabel=label, ylabel="error, relative to the weights", xlim=(0, 1.1 * max(shown.values())), ylim=(4e-3, 1.1))
    _points(axes, list(shown), [(speed, row.best_normal) for row, speed in shown.items()])
    legend(axes, loc=corner, ncols=2)
    return picture(fig, description)


def _points(axes, table: Sequence[Row], places: Sequence[tuple[float, float]]):
    """A marker and a name for every type in its family's colour, the name where no other name is."""
    for name, (colour, marker, types) in FAMILIES.items():
        own = [place for row, place in zip(table, places) if row.type in types]
        if own:
            axes.plot(*zip(*own), marker, color=colour, ms=6, ls="none", label=name)
    missing = {row.type for row in table} - {kind for _, _, types in FAMILIES.values() for kind in types}
    if missing:
        raise ValueError(f"no family for {', '.join(sorted(missing))}")
    colours = {kind: colour for colour, _, types in FAMILIES.values() for kind in types}
    axes.figure.draw_without_rendering()
    points = [axes.transData.transform(place) * 72 / axes.figure.dpi for place in places]
    taken = [(x - 4, y - 4, 8, 8) for x, y in points]
    # from top to bottom: of two points, one above the other, the upper one has the upper name
    for row, (x, y), (left, low) in sorted(zip(table, places, points), key=lambda part: -part[2][1]):
        for dx, dy, align in ((7, -3, "left"), (-7, -3, "right"), (6, 4, "left"), (6, -10, "left"), (-6, 4, "right"), (-6, -10, "right")):
            width = 3.9 * len(row.type)
            box = (left + dx - (width if align == "right" else 0), low + dy, width, 7)
            if not any(a < box[0] + box[2] and box[0] < a + c and b < box[1] + box[3] and box[1] < b + d for a, b, c, d in taken):
                break
        taken.append(box)
        axes.annotate(row.type, (x, y), (dx, dy), textcoords="offset points", ha=align, fontsize=7, color=colours[row.type])
