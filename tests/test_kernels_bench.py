"""The products of every weight type: every type with kernels is in the table, and its figures are what they say."""

import json

import numba
import numpy as np
import pytest
from cli import assert_one_line, run

from refimpl.cli.show.bench import kernels_text
from refimpl.formats.quants.codecs import QUANTIZABLE
from refimpl.kernels.machine.unpack import LAYOUTS
from refimpl.lab.bench import kernels_bench as module
from refimpl.lab.bench import peak as peak_module
from refimpl.lab.bench.kernels_bench import errors, measure_kernels
from refimpl.lab.bench.peak import EACH, N_CODES, peak

SMALL = {"memory_bytes": 1 << 16, "cached_rows": 32, "repetitions": 2}
WIDTH = 256             # of rows, where it does not matter


@pytest.fixture
def clock(monkeypatch):
    """Products are only noted, with the threads that Numba has; one takes a second, and the peak is 10^9 (floats: 10^8) a thread."""
    made, ticks = [], iter(range(10**6))
    monkeypatch.setattr(module, "WIDTH", WIDTH)
    monkeypatch.setattr(module, "matmul_q8", lambda x, w: made.append((w.type, len(x), w.shape[0], numba.get_num_threads())))
    monkeypatch.setattr(module, "sum_parts", lambda data, out: None)
    monkeypatch.setattr(module, "peak", lambda floats, n: n * (10**8 if floats else 10**9))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    return made


def test_products_hold_speeds_and_shares(clock):
    result = json.loads(json.dumps(measure_kernels(rows=(1, 32), threads=2, **SMALL)))
    assert [entry["type"] for entry in result["types"]] == list(LAYOUTS) and {"Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"} <= set(LAYOUTS)
    bits = {entry["type"]: entry["bits"] for entry in result["types"]}
    assert {name: bits[name] for name in ("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "F16")} == {
        "Q2_K": 2.625, "Q3_K": 3.4375, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "MXFP4": 4.25, "F16": 16}
    for entry in result["types"]:
        assert ("error_normal" in entry) == (entry["type"] in QUANTIZABLE)
    order = [(name, n, rows) for name in LAYOUTS for n in (1, 2) for rows in (1, 32)]
    assert [(entry["type"], entry["threads"], entry["rows"]) for entry in result["products"]] == order
    n = 1 << 16
    for entry in result["products"]:                            # a second each
        name, tile = entry["type"], 16 * WIDTH * bits[entry["type"]] / 8
        weights = n // tile * 16 * WIDTH if entry["rows"] == 1 else 32 * WIDTH
        assert entry["multiply_adds_per_second"] == entry["rows"] * weights and entry["weight_bytes_per_second"] == weights * bits[name] / 8
        most = entry["threads"] * (10**8 if name in ("F32", "F16", "BF16") else 10**9)
        assert entry["share_of_peak"] == pytest.approx(entry["rows"] * weights / most)
        assert entry["ratio"] == pytest.approx(weights / (n // (16 * WIDTH * 4.5 / 8) * 16 * WIDTH) if entry["rows"] == 1 else 1)
        assert ("share_of_bandwidth" in entry) == (entry["rows"] == 1)
        assert entry.get("share_of_bandwidth", 1) == pytest.approx(weights * bits[name] / 8 / n if entry["rows"] == 1 else 1)
    text = kernels_text(result)
    assert all(name in text for name in LAYOUTS) and "of peak" in text and text.replace("─", "").isascii()


def test_types_take_turns_with_the_base(clock):
    measure_kernels(["Q8_0"], (1, 5, 9), threads=2, **SMALL)
    names = [(name, rows, threads) for name, rows, _, threads in clock]
    assert names == [(name, rows, threads) for threads in (1, 2) for _ in range(3) for rows in (1, 5, 9) for name in ("Q4_0", "Q8_0")]
    assert {(rows, n_out) for name, rows, n_out, _ in clock if name == "Q8_0"} == {(1, 240), (5, 240), (9, 32)}


def test_a_clock_for_the_peak(monkeypatch):
    """Multiply-adds of all threads over the seconds of one pass, by a clock that ticks; the sums are those of so many products."""
    monkeypatch.setattr(peak_module.time, "perf_counter", iter(range(0, 100, 2)).__next__)
    assert peak(False, 2, 8) == 2 * 8 * len(EACH) * 4 * N_CODES / 2 and peak(True, 1, 8) == 8 * len(EACH) * 16 / 2
    codes, x, out = np.full((len(EACH), 64), 3, np.uint8), np.full(64, 2, np.uint8), np.zeros((2, 16), np.int32)
    peak_module.dots(codes, x, 10, out)
    assert (out[:, :N_CODES // 4] == sum(EACH) + len(EACH) * 10 * 4 * 4 * 6).all()
    floats = np.zeros((1, 16), np.float32)
    peak_module.products(np.full(16, 3, np.float32), 10, floats)
    assert (floats == sum(EACH) + len(EACH) * 30).all()


def test_on_the_command_line(monkeypatch):
    """The real thing on tiny matrices."""
    monkeypatch.setattr(module.measure_kernels, "__kwdefaults__", {**module.measure_kernels.__kwdefaults__, **SMALL})
    code, out, err = run("bench", "--kernels", "--types", "Q4_0", "--rows", "1,9", "-r", 1, "-t", 1, "--json")
    products = json.loads(out)["products"]
    assert code == 0 and [(e["type"], e["threads"], e["rows"]) for e in products] == [("Q4_0", 1, 1), ("Q4_0", 1, 9)]
    assert all(e["multiply_adds_per_second"] > 0 and 0 < e["share_of_peak"] for e in products) and products[0]["share_of_bandwidth"] > 0
    assert all(line.startswith("compiling kernels") for line in err.splitlines())
    assert run("bench", "--kernels", "--types", "Q4_0", "--rows", 1, "-r", 1, "-t", 1)[1].count("Q4_0") == 2       # a line, and the heading


@pytest.mark.parametrize("status,says,options", [
    (1, "no kernels for NVFP4, Q1_0; there are for Q4_0", ["--kernels", "--types", "Q4_0,NVFP4,Q1_0"]),
    (1, "no kernels for ; there are for Q4_0", ["--kernels", "--types", ""]),
    (1, "rows 0, 5: expected numbers from 1 to 4096", ["--kernels", "--rows", "0,5"]),
    (1, "--rows 1,x: expected numbers", ["--kernels", "--rows", "1,x"]),
    (1, "threads=300: expected", ["--kernels", "-t", "300"]),
    (2, "need --kernels", ["--types", "Q4_0"]),
    (2, "without a model", ["--kernels", "-m", "model.gguf"]),
])
def test_senseless_wishes_are_refused(status, says, options):
    assert_one_line(run("bench", *options), status, says)


def test_errors_are_relative(monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 1024)
    found = {name: errors(name) for name in ("F32", "Q8_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K")}
    for kind in ("error_normal", "error_laplace"):
        values = [entry[kind] for entry in found.values()]
        assert values == sorted(values)
        assert values[0] == 0 and 0.25 < values[-1] < 0.32
    assert errors("Q8_1") == {}
