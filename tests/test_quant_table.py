"""The table of types, and the bits of a block that the notebook takes apart."""

import math
import sys

import numpy as np
import pytest

from refimpl.formats.quants.blocks import BLOCKS, fields_of
from refimpl.formats.quants.codecs import DEQUANTIZABLE, QUANTIZABLE, dequantize, quantize
from refimpl.formats.quants.k.q4_k import unpack_scales
from refimpl.kernels.machine.unpack import LAYOUTS
from refimpl.lab.explain import blocks, quant_table
from refimpl.lab.explain.blocks import bit_owners, number_of
from refimpl.lab.explain.ggml import ggml_quantize

ROWS = {row.type: row for row in quant_table.rows()}
NORMAL = np.random.default_rng(1).standard_normal(256).astype(np.float32)
BLOCK = {name: quantize(NORMAL[:BLOCKS[name].elements], name) for name in ("Q4_0", "Q4_K")}


def test_every_type_is_a_row():
    assert set(ROWS) == set(DEQUANTIZABLE)
    assert [row.bits for row in ROWS.values()] == sorted(row.bits for row in ROWS.values())
    assert ROWS["Q4_0"].bits == ROWS["Q4_0"].held_bits == 4.5 and (ROWS["IQ2_XS"].bits, ROWS["IQ2_XS"].held_bits) == (2.3125, 32)
    assert all(row.held_bits == (row.bits if row.type in LAYOUTS else 32) for row in ROWS.values())
    assert all(math.isnan(row.decode) == math.isnan(row.prompt) == (row.type not in LAYOUTS) for row in ROWS.values())
    assert all(math.isnan(row.normal) == (row.type not in QUANTIZABLE) for row in ROWS.values())


def test_errors_are_those_of_the_types():
    assert ROWS["F32"].normal == 0
    assert ROWS["Q4_0"].normal == pytest.approx(0.0861, rel=1e-2) and ROWS["Q8_0"].laplace == pytest.approx(0.00675, rel=1e-2)
    assert ROWS["Q4_K"].normal < ROWS["Q4_0"].normal < ROWS["Q4_0"].laplace
    for row in ROWS.values():
        if row.best_normal > 0:
            assert row.best_normal > 2.0**-row.bits, f"{row.type} would beat the rate-distortion bound"


@pytest.mark.parametrize("type_name", sorted(QUANTIZABLE & set(quant_table.GGML)))
def test_what_was_recorded_of_ggml_fits_what_is_measured_here(type_name):
    """The same errors where both quantizers give the same bytes; nearly the same where both search, ours (Q2_K most) with smaller ones."""
    row = ROWS[type_name]
    searched = type_name.endswith("_K") or type_name.startswith(("IQ", "MXFP"))
    for ours, theirs in ((row.normal, row.ggml_normal), (row.laplace, row.ggml_laplace)):
        assert 0.85 * theirs < ours < 1.03 * theirs if searched else ours == pytest.approx(theirs, rel=4e-3)


def test_cells_say_what_the_rows_say():
    table = list(ROWS.values())
    cells = {line[0]: line for line in quant_table.cells(table)}
    assert all(len(line) == len(quant_table.HEAD) for line in cells.values())
    assert cells["IQ3_S"] == ["IQ3_S", "3.438", "32", "", "16.6 %", "", "19.7 %", "9.71", "", ""]
    assert cells["Q4_0"][3] == cells["Q4_0"][4] == "8.61 %" and cells["Q8_1"][3:] == [""] * 7


def test_without_ggml_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    from refimpl.lab.explain import ggml

    ggml.library.cache_clear()
    with pytest.raises(ValueError, match="llama_cpp is not installed; pip install"):
        ggml_quantize(np.zeros((1, 32), np.float32), "Q4_0")


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K"])
def test_every_bit_belongs_to_what_is_written_down(type_name):
    """Each bit turned alone moves its own weight, or weights of its own sub-block, and no others."""
    block, owners = BLOCK[type_name], [own for byte in bit_owners(type_name) for own in byte]
    n, part = BLOCKS[type_name].elements, 32
    turned = np.packbits(np.unpackbits(block)[None] ^ np.eye(8 * len(block), dtype=np.uint8), axis=-1)
    assert len(owners) == len(turned) == 8 * BLOCKS[type_name].n_bytes
    difference = dequantize(turned, type_name) - dequantize(block, type_name)
    for own, by in zip(owners, difference):
        found = set(np.flatnonzero(by).tolist())
        if own[0] == "q":
            assert found == {int(own[1:])}, own
        elif own[0] in "sm":
            k = int(own[1:])
            assert found and found <= set(range(part * k, part * k + part)), own
            assert own[0] == "s" or len(found) == part
        else:
            assert len(found) > n // 2, own
            if np.isfinite(by).all():       # dmin moves a sub-block as a whole, d each weight by its own q
                assert (np.ptp(by.reshape(-1, part), axis=1).max() < 0.02 * np.abs(by).max()) == (own == "dmin"), own


def test_numbers_of_a_block():
    small, large = BLOCK["Q4_0"], BLOCK["Q4_K"]
    q = [number_of(small, "Q4_0", f"q{j}") for j in range(32)]
    assert np.array_equal(dequantize(small, "Q4_0"), np.float32(small[:2].view("<f2")[0]) * (np.array(q, np.float32) - 8))
    s, m = unpack_scales(fields_of(large, BLOCKS["Q4_K"])["scales"][0])
    assert [number_of(large, "Q4_K", f"s{k}") for k in range(8)] == s.tolist()
    assert [number_of(large, "Q4_K", f"m{k}") for k in range(8)] == m.tolist()
    with pytest.raises(ValueError, match="Q4_K: expected one block of 144 bytes"):
        number_of(small, "Q4_K", "s0")
    with pytest.raises(ValueError, match="Q5_K are not written down"):
        bit_owners("Q5_K")


def test_pictures_are_pictures():
    table = list(ROWS.values())
    x = np.zeros(32, np.float32)
    pictures = (blocks.error_picture(table), blocks.speed_picture(table), blocks.kernels_picture(table),
                blocks.bits_picture(BLOCK["Q4_0"], "Q4_0", range(18), 6, ("q3",)),
                blocks.weights_picture(x, x, np.zeros((1, 16)), "A block"))
    assert all(shown.data.startswith(b"\x89PNG") and len(shown.data) > 3000 for shown in pictures)


def test_every_type_has_one_family():
    types = [kind for _, _, own in blocks.FAMILIES.values() for kind in own]
    assert len(types) == len(set(types)) and set(types) <= set(BLOCKS)
    assert set(types) >= {name for name in BLOCKS if name not in ("F32", "F64", "I8", "I16", "I32", "I64", "Q8_1")}
