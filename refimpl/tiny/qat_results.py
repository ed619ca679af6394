"""Results of `qat.py` and `qat_release.py`, as they ship with the package: `results()`, and `as_text` for tables.

`python -m refimpl.tiny.qat_results tiny-qat` gathers them from the folder of such a run into `qat.json` beside this file. Needs no torch.

The results that ship started from a checkpoint of the run that made the built-in model: in float, at full learning rate, about a third of
its 3,700 steps in. `python -m refimpl.tiny.training.train --steps 1200 --decay 0.01 --qat 0 --out tiny-float` makes one like it.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

FILE = Path(__file__).with_name("qat.json")
ORDER = ("float", "q4_k", "q4_0", "w4a16", "3-bit", "2-bit")
TITLES = {"float": "float", "q4_k": "Q4_K", "q4_0": "Q4_0", "w4a16": "W4A16", "3-bit": "Q4_0, 3 bits", "2-bit": "Q4_0, 2 bits"}
RELEASES = ("absmax", "recovered")      # conversions of a release to Q4_0: llama.cpp's rule, the grid found again (recover_scales.py)
METRICS = ("bits_per_byte", "nats", "kl", "top1", "moved")
SHOWN_HISTORY = {"float": ("q4_0", "2-bit"), "q4_0": ("q4_0",), "2-bit": ("2-bit",)}     # histograms kept, of seed 0


def results() -> dict[str, object]:
    """Settings, the rows of every seed, their means and spreads, and histories of seed 0: see `gather`."""
    return json.loads(FILE.read_text())


def gather(folder: Path) -> dict[str, object]:
    """The contents of a run's folder as one object.

    settings  of the run, with the Python whose library was the text
    rows      one for each seed and pair: trained (on a grid, or "float"), stored, bits_per_byte, nats a token; kl, top1 against the control
    mean      for each pair the mean over seeds, their standard deviation (0 for a single seed) and number
    against   for each grid and seed, trained on it minus control rounded to it, in bits per byte; and the share of the loss won back
    releases  the same for conversions of bfloat16 releases (RELEASES), kl and top1 against the release
    history   of seed 0: losses (means of 10 steps), share of codes that change in a step, histograms of w / d
    """
    rows = _read(folder / "rows.jsonl")
    releases = [_rounded(row) for row in _read(folder / "releases.jsonl")]
    histories = {row["trained"]: row["history"] for row in rows if "history" in row and row["seed"] == 0}
    for name, history in histories.items():
        kept = SHOWN_HISTORY.get(name, ())
        history["histograms"] = [{key: value for key, value in h.items() if key == "step" or key in kept} for h in history["histograms"]] \
            if kept else []
    rows = [_rounded({key: value for key, value in row.items() if key != "history"}) for row in rows]
    settings = json.loads((folder / "settings.json").read_text())
    del settings["base"], settings["quick"]                     # a path of somebody's machine
    return {"settings": settings, "rows": rows, "mean": _means(rows, ("trained", "stored")),
            "against": _against(rows), "releases": releases,
            "releases_mean": _means(releases, ("trained", "converted")), "history": histories}


def _read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _rounded(row: dict[str, object]) -> dict[str, object]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def _means(rows, keys: tuple[str, str]) -> list[dict[str, object]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    found = []
    for group, members in groups.items():
        entry = dict(zip(keys, group)) | {"seeds": len(members)}
        for metric in METRICS:
            values = [row[metric] for row in members if metric in row]
            if values:
                entry[metric] = round(statistics.fmean(values), 5)
                entry[f"{metric}_sd"] = round(statistics.stdev(values), 5) if len(values) > 1 else 0.0
        found.append(entry)
    return found


def _against(rows) -> list[dict[str, object]]:
    bits = {(row["seed"], row["trained"], row["stored"]): row["bits_per_byte"] for row in rows}
    found = []
    for name in ORDER[1:]:
        seeds = [seed for seed, trained, _ in bits if trained == name]
        won = [bits[seed, name, name] - bits[seed, "float", name] for seed in seeds]
        lost = [bits[seed, "float", name] - bits[seed, "float", "float"] for seed in seeds]
        if seeds:
            found.append({"grid": name, "seeds": seeds, "difference": [round(x, 5) for x in won], "mean": round(statistics.fmean(won), 5),
                          "sd": round(statistics.stdev(won), 5) if len(won) > 1 else 0.0,
                          "rounding_costs": round(statistics.fmean(lost), 5),
                          "share_won_back": round(-sum(won) / sum(lost), 3)})
    return found


def as_text(found: dict[str, object]) -> str:
    """Tables of the means, with standard deviations over the seeds."""
    mean = {(m["trained"], m["stored"]): m for m in found["mean"]}
    lines = ["weights               bits per byte     KL from control   same top-1       seeds"]
    for name in ORDER:
        for trained in dict.fromkeys(("float", name)):
            if (m := mean.get((trained, name))) is not None:
                what = "float control" if name == "float" else f"{TITLES[name]}, {'rounded' if trained == 'float' else 'trained'}"
                lines.append(f"{what:<22}{_with_spread(m, 'bits_per_byte'):<18}{_with_spread(m, 'kl'):<18}{_with_spread(m, 'top1'):<17}"
                             f"{m['seeds']}")
    lines += ["", "trained minus rounded, bits per byte (below 0: training on the grid helps)"]
    for entry in found["against"]:
        lines.append(f"{TITLES[entry['grid']]:<22}{entry['mean']:+.4f}  each seed: {', '.join(f'{x:+.4f}' for x in entry['difference'])}"
                     f"  rounding costs {entry['rounding_costs']:.4f}, of which {entry['share_won_back']:.0%} won back")
    lines += ["", "weights               converted             KL from release  same top-1       moved by it"]
    for m in found["releases_mean"]:
        if m["converted"] in RELEASES:
            moved = f"{m['moved']:.1%}" if m["converted"] == "absmax" else ""
            lines.append(f"{TITLES[m['trained']]:<22}{m['converted']:<22}{_with_spread(m, 'kl'):<17}{_with_spread(m, 'top1'):<17}{moved}")
    return "\n".join(lines)


def _with_spread(entry: dict[str, object], metric: str) -> str:
    value, spread = entry[metric], entry[f"{metric}_sd"]
    return f"{value:.4f} ± {spread:.4f}" if not math.isclose(spread, 0) else f"{value:.4f}"


def main(argv: list[str] | None = None):
    """Gathers a folder into the file that ships, and shows it; without a folder only shows."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.qat_results", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="what tiny.training.qat wrote")
    folder = parser.parse_args(argv).folder
    if folder is not None:
        try:
            found = gather(folder)
        except (ValueError, OSError) as e:
            parser.error(str(e))
        FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(as_text(results()))


if __name__ == "__main__":
    main()
