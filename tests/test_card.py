"""The model card says what was measured: its figures are those of measured.json, qat.json and the files themselves."""

import json
import math
from pathlib import Path

import pytest

from refimpl.formats.gguf import open_gguf
from refimpl.loading.hub import BUILT_IN_FOLDERS, BUILT_IN_NAMES, local
from refimpl.tiny.qat_results import results

TINY = Path(__file__).parent.parent / "refimpl" / "tiny"
CARD = (TINY / "README.md").read_text()
MEASURED = json.loads((TINY / "measured.json").read_text())
BYTE, FIVE_GRAM, XZ = "model", "5-gram", "xz -9"
DRAFTED_BY = {"drafter": "the drafter", "copy": "copying what followed the last two tokens before",
              "bigram": "the most frequent bigram of the training text"}


def rows_of(title: str) -> list[list[str]]:
    """The cells of all lines of tables that start with this cell, without marks of emphasis."""
    lines = [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in CARD.splitlines() if line.startswith("|")]
    return [cells[1:] for cells in lines if cells[0] == title]


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def test_bits_per_byte():
    first, second = (MEASURED["evaluate"][name] for name in BUILT_IN_FOLDERS)
    assert rows_of("this model, from the Q4_0 file") == [[f"{first[BYTE]:.3f}"]]
    assert rows_of("5-gram model, Kneser-Ney, same vocabulary and training text") == [[f"{first[FIVE_GRAM]:.3f}"]]
    assert rows_of("`xz -9`") == [[f"{first[XZ]:.3f}"]]
    assert rows_of("bits per byte")[0][0] == (f"{second[BYTE]:.3f} (the first model {first[BYTE]:.3f}, the 5-gram model "
                                             f"{first[FIVE_GRAM]:.3f})")
    assert f"{first['files']} modules ({first['bytes']:,} bytes)" in CARD and f"Python {first['python']}" in CARD


@pytest.mark.parametrize("place, name", [*enumerate(BUILT_IN_FOLDERS)])
@pytest.mark.parametrize("by", DRAFTED_BY)
def test_drafting(place, name, by):
    runs = MEASURED["evaluate_drafter"][name]
    found = [(", ".join(map(percent, run[by]["acceptance"])), f"{run[by]['tokens_per_round']:.2f}") for run in runs]
    assert [run["temperature"] for run in runs] == [0.0, 0.7] and {run["prompts"] for run in runs} == {120}
    assert rows_of(DRAFTED_BY[by])[place] == [cell for pair in found for cell in pair]


@pytest.mark.parametrize("title, asked", [("picture, newline", "<picture>\n"), ("`# `, picture", "# <picture>")])
def test_reading(title, asked):
    found = MEASURED["evaluate_projector"]
    assert rows_of(title) == [[f"{100 * found[asked]['read']:.1f} %"]] and f"--cards {found['cards']}" in CARD


def test_training_on_the_grid():
    found = results()
    mean = {(row["trained"], row["stored"]): (row["bits_per_byte"], row["bits_per_byte_sd"]) for row in found["mean"]}
    against = {row["grid"]: row["difference"] for row in found["against"]}
    for title, grid in (("Q4_K", "q4_k"), ("Q4_0", "q4_0"), ("W4A16", "w4a16"), ("Q4_0 with 3 bits", "3-bit"),
                        ("Q4_0 with 2 bits", "2-bit")):
        (cells,) = rows_of(title)
        want = [f"{bits:.4f} ± {sd:.4f}".replace("± 0.", "± .") for bits, sd in (mean["float", grid], mean[grid, grid])]
        assert cells[:3] == [*want, " ".join(f"{d:+.4f}".replace("0.", ".") for d in against[grid])]


@pytest.mark.parametrize("place, name", [*enumerate(BUILT_IN_FOLDERS)])
def test_sizes(place, name):
    for column, role in enumerate(("model", "drafter")):
        path = local(name, role)
        n = sum(math.prod(info.shape) for info in open_gguf(path).tensors.values())
        said = rows_of("parameters")[place][column]
        digits = len(said.split()[0].partition(".")[2])
        assert said.startswith(f"{n / 1e6:.{digits}f} million"), (path, n)
        size = path.stat().st_size
        assert (f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB") in rows_of("file")[place][column]
    assert f"{sum(math.prod(i.shape) for i in open_gguf(TINY / BUILT_IN_NAMES['projector']).tensors.values()):,} parameters" in CARD
