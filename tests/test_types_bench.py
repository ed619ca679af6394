"""The table of types: every type with kernels is in it, and its figures are what they say."""

import numba
import numpy as np
import pytest

from refimpl.formats.quants.codecs import QUANTIZABLE
from refimpl.kernels.machine.unpack import LAYOUTS
from refimpl.lab.bench import types_bench as module
from refimpl.lab.bench.types_bench import errors, in_turn, measure_types


def test_rows_hold_size_speed_and_error(monkeypatch):
    """Small matrices and a clock that ticks: every type once, speeds from bytes, operations and seconds."""
    made, ticks = [], iter(range(10**6))
    monkeypatch.setattr(module, "matmul_q8", lambda x, w: made.append((w.type, len(x), w.shape)))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    rows = measure_types(threads=(1,), repetitions=2, decode_bytes=1 << 20, prompt_rows=32)
    assert [row["type"] for row in rows] == list(LAYOUTS) and {"Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"} <= set(LAYOUTS)
    by_type = {row["type"]: row for row in rows}
    assert {name: by_type[name]["bits"] for name in ("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "F16")} == {
        "Q2_K": 2.625, "Q3_K": 3.4375, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "MXFP4": 4.25, "F16": 16}
    n = 1 << 20
    for row in rows:                            # a second a run
        tile = 16 * 4096 * row["bits"] / 8
        assert row["decode_1"] == pytest.approx(n // tile * tile / 1e9) and row["prompt_1"] == pytest.approx(2 * 512 * 4096 * 32 / 1e9)
        assert row["prompt_1_ratio"] == 1 and row["decode_1_ratio"] == pytest.approx((n // tile) / (n // (16 * 4096 * 4.5 / 8)))
        assert ("error_normal" in row) == (row["type"] in QUANTIZABLE)
    decode = [(name, t) for name, t, _ in made if t == 1]
    assert decode[:6] == [(name, 1) for name in (rows[0]["type"], "Q4_0") * 3] and len(decode) == 6 * len(rows)
    assert {shape for _, t, shape in made if t == 512} == {(32, 4096)}


def test_types_without_kernels_are_refused():
    with pytest.raises(ValueError, match="no kernels for NVFP4, Q1_0; there are for Q4_0"):
        measure_types(["Q4_0", "NVFP4", "Q1_0"])


def test_errors_are_relative():
    found = {name: errors(name) for name in ("F32", "Q8_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K")}
    for kind in ("error_normal", "error_laplace"):
        values = [entry[kind] for entry in found.values()]
        assert values == sorted(values)
        assert values[0] == 0 and 0.25 < values[-1] < 0.32
    assert errors("Q8_1") == {}


def test_products_are_timed_on_so_many_threads(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "matmul_q8", lambda x, w: seen.append(numba.get_num_threads()))
    pair = module._matrix("Q4_0", 1 << 16, np.random.default_rng(0)), module._matrix("Q8_0", 1 << 16, np.random.default_rng(0))
    seconds, ratio = in_turn(pair, np.zeros((1, 4096), np.float32), 1, 3)
    assert seen == [1] * 8 and seconds > 0 and ratio > 0
