"""The block formats against gguf-py: decoding bit for bit, encoding bit for bit, geometry number for number.

NaN is compared as NaN == NaN: its payload and sign depend on the order of a product's operands and on the processor, and nothing
downstream reads them. Everything else, the sign of zero included, must have the same 32 bits.
"""

import doctest
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.formats.quants.basic.q8_0 import round_half_away
from refimpl.formats.quants.blocks import BLOCKS, TYPE_IDS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.codecs import DEQUANTIZABLE, QUANTIZABLE, UnsupportedType, dequantize, quantize
from refimpl.formats.quants.floats import dequantize_bf16, reciprocal
from refimpl.formats.quants.k import q4_k
from refimpl.formats.quants.k.q4_k import pack_scales, unpack_scales

SEED = 20240229
N_BLOCKS = 5_120
DECODED = sorted(DEQUANTIZABLE)
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]      # encoded by a search of our own
ENCODED_BY_GGUF = sorted(QUANTIZABLE - {*SEARCHED, "Q8_K"})
SCALE_FIELDS = {name: [f for f, kind, _ in BLOCKS[name].fields if kind == "<f2" and f != "x"] for name in DECODED}
SCALED = [name for name in DECODED if SCALE_FIELDS[name]]
FIXTURE = Path(__file__).parent / "files" / "types.npz"  # blocks that ggml wrote and read: see make_types.py beside it
BY_GGML = sorted({name.split()[0] for name in np.load(FIXTURE) if name != "normal"})


def bits_in(fields, n_bits):
    """Consecutive fields of n_bits, low bits first, by NumPy's own unpacking."""
    bits = np.unpackbits(fields, axis=-1, bitorder="little").reshape(*fields.shape[:-1], -1, n_bits)
    return bits @ (1 << np.arange(n_bits))


# Types that gguf-py sizes and does not decode, written down a second time; test_decode_as_ggml has ggml's own word on them.
BY_HAND = {
    "Q1_0": lambda b: b["d"].astype(np.float32)[..., None] * np.where(bits_in(b["qs"], 1) == 1, 1, -1).astype(np.float32),
    "Q2_0": lambda b: b["d"].astype(np.float32)[..., None] * (bits_in(b["qs"], 2) - 1).astype(np.float32),
    "Q8_1": lambda b: b["d"].astype(np.float32)[..., None] * b["qs"],
    "Q8_K": lambda b: b["d"][..., None] * b["qs"],
}


def gguf_dequantize(raw, type_name):
    with np.errstate(all="ignore"):
        if type_name in BY_HAND:
            return BY_HAND[type_name](fields_of(raw, BLOCKS[type_name])).reshape(*raw.shape[:-1], -1)
        return oracle.dequantize(raw, gguf.GGMLQuantizationType[type_name])


def gguf_quantize(x, type_name):
    with np.errstate(all="ignore"):
        return oracle.quantize(x, gguf.GGMLQuantizationType[type_name]).view(np.uint8)


def assert_same(ref, got, why, block=None, raw=None):
    """Same shape, dtype and bits (NaN == NaN); on failure the block with most wrong elements, and both as hex."""
    assert ref.shape == got.shape and ref.dtype == got.dtype, f"{why}: {got.dtype}{got.shape}, expected {ref.dtype}{ref.shape}"
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[ref.itemsize]
    wrong = np.ascontiguousarray(ref).view(bits) != np.ascontiguousarray(got).view(bits)
    if ref.dtype.kind == "f":
        wrong &= ~(np.isnan(ref) & np.isnan(got))
    if not wrong.any():
        return
    n = 1 if block is None else block.elements if ref.dtype == np.float32 else block.n_bytes
    wrong_blocks = wrong.reshape(-1, n).sum(axis=1)
    worst = int(wrong_blocks.argmax())

    def as_hex(a):
        return np.ascontiguousarray(a).reshape(-1, n)[worst].astype(a.dtype.newbyteorder(">")).tobytes().hex(" ", ref.itemsize)

    stored = "" if raw is None else f"\n  raw {np.ascontiguousarray(raw).reshape(-1, block.n_bytes)[worst].tobytes().hex(' ')}"
    raise AssertionError(
        f"{why}: {wrong.sum()} of {wrong.size} values differ in {np.count_nonzero(wrong_blocks)} blocks; worst is block {worst} "
        f"({wrong_blocks[worst]} of {n}){stored}\n  ref {as_hex(ref)}\n  got {as_hex(got)}"
    )


def check_decode(raw, type_name, why):
    ref, got = gguf_dequantize(raw, type_name), dequantize(raw, type_name)
    assert_same(ref, got, f"{type_name} decoding, {why}", BLOCKS[type_name], raw)


def random_raw(type_name, n_blocks=N_BLOCKS, rows=16, seed=SEED):
    return np.random.default_rng(seed).integers(0, 256, (rows, n_blocks // rows * BLOCKS[type_name].n_bytes), dtype=np.uint8)


# --- the table


def test_type_ids_are_ggufs():
    ours = {number: name for number, name in TYPE_IDS.items() if name != "Q2_0"}  # newer than gguf 0.19; number from ggml.h
    assert ours == {int(t): t.name for t in gguf.GGMLQuantizationType if t.name != "Q2_0"}
    assert set(TYPE_IDS.values()) == set(BLOCKS)


@pytest.mark.parametrize("gguf_type", list(gguf.GGML_QUANT_SIZES), ids=lambda t: t.name)
def test_geometry_is_ggufs(gguf_type):
    block = BLOCKS[gguf_type.name]
    expected = gguf.GGML_QUANT_SIZES[gguf_type]
    if gguf_type.name == "Q8_1":  # gguf-py kept two float32; block_q8_1 in ggml-common.h is two halves and 32 bytes
        expected = (32, 2 + 2 + 32)
    assert (block.elements, block.n_bytes) == expected


@pytest.mark.parametrize("type_name", sorted(BLOCKS))
def test_fields_are_packed_and_little_endian(type_name):
    block = BLOCKS[type_name]
    assert block.n_bytes == sum(np.dtype(kind).itemsize * count for _, kind, count in block.fields)
    assert all(kind[0] == "<" or np.dtype(kind).itemsize == 1 for _, kind, _ in block.fields)


def test_fields_of_views_without_copying():
    raw = random_raw("Q4_K", 64)
    view = fields_of(raw, BLOCKS["Q4_K"])
    assert view.shape == (16, 4) and np.shares_memory(view, raw)


# --- packing


@pytest.mark.parametrize("n_bits,group", [(4, 1), (4, 8), (4, 16), (4, 32), (4, 64), (2, 4), (2, 32), (1, 32)])
def test_pack_inverts_unpack(n_bits, group):
    packed = np.random.default_rng(SEED).integers(0, 256, (3, 5, 128), dtype=np.uint8)
    values = unpack(packed, n_bits, group)
    assert values.shape == (3, 5, 128 * 8 // n_bits) and values.max() == 2**n_bits - 1
    assert_same(packed, pack(values, n_bits, group), "pack(unpack(bytes))")


def test_unpack_takes_low_bits_first():
    assert unpack(np.array([0x21, 0x43], np.uint8), n_bits=4, group=2).tolist() == [1, 3, 2, 4]


def test_six_bit_scales_one_at_a_time():
    """Each of the 16 fields alone at 63 touches exactly its own six bits, and comes back."""
    seen = np.zeros(12, np.uint8)
    for i in range(16):
        fields = np.zeros(16, np.uint8)
        fields[i] = 63
        packed = pack_scales(fields[:8], fields[8:])
        assert np.bitwise_count(packed).sum() == 6 and not (packed & seen).any()
        seen |= packed
        assert np.concatenate(unpack_scales(packed)).tolist() == fields.tolist()
    assert (seen == 255).all()


@given(st.binary(min_size=12, max_size=12))
def test_six_bit_scales_against_gguf(scales):
    packed = np.frombuffer(scales, np.uint8)
    s, m = unpack_scales(packed)
    ref_s, ref_m = oracle.Q4_K.get_scale_min(packed.reshape(1, 12))
    assert s.tolist() == ref_s[0].tolist() and m.tolist() == ref_m[0].tolist()
    assert_same(packed, pack_scales(s, m), "6-bit fields packed again")


# --- decoding, bit for bit


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type_name", DECODED)
def test_decode_random_bytes(type_name):
    check_decode(random_raw(type_name), type_name, "random bytes")


@pytest.mark.parametrize("type_name", sorted(DEQUANTIZABLE & QUANTIZABLE))
def test_decode_quantized_normals(type_name):
    x = np.random.default_rng(SEED).standard_normal((16, 4096), dtype=np.float32)
    check_decode(quantize(x, type_name), type_name, "normal weights")


@pytest.mark.parametrize("type_name", DECODED)
def test_decode_zero_blocks(type_name):
    raw = np.zeros((2, 8 * BLOCKS[type_name].n_bytes), np.uint8)
    check_decode(raw, type_name, "zero bytes")
    assert not dequantize(raw, type_name).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type_name", SCALED)
def test_decode_awkward_scales(type_name):
    """Denormals, zeros of both signs, the largest half, infinities and NaN as every pair of scale fields."""
    finite = [0x0001, 0x8001, 0x03FF, 0x0400, 0x0000, 0x8000, 0x7BFF, 0xFBFF]
    awkward = np.array([*finite, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF], np.uint16)
    names = SCALE_FIELDS[type_name]
    grid = np.stack(np.meshgrid(*[awkward] * len(names), indexing="ij"), -1).reshape(-1, len(names))
    raw = random_raw(type_name, len(grid) * 8, rows=8)
    for i, name in enumerate(names):
        fields_of(raw, BLOCKS[type_name])[name] = grid[:, i].view("<f2")
    check_decode(raw, type_name, "awkward scales")


@pytest.mark.parametrize("type_name", BY_GGML)
def test_decode_as_ggml(type_name):
    """A block that ggml quantized, and one of random bytes, against ggml's own decoder: codebooks and layouts from a second source."""
    stored = np.load(FIXTURE)
    raw, weights = stored[f"{type_name} raw"], stored[f"{type_name} weights"]
    assert_same(weights, dequantize(raw, type_name), f"{type_name} as ggml reads it", BLOCKS[type_name], raw)
    error = rms(weights[0] - stored["normal"])
    assert error < 0.9, f"ggml's block of normal weights is no such thing: error {error}"
    if type_name in QUANTIZABLE:
        assert_same(raw[:1], quantize(stored["normal"], type_name), f"{type_name} as ggml writes it", BLOCKS[type_name])


def test_decode_awkward_scales_in_four_pieces():
    """IQ1_M keeps a nibble of its half in each of four words."""
    awkward = np.array([0x0001, 0x8001, 0x03FF, 0x0400, 0x0000, 0x8000, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x1234, 0xFEDC], np.uint16)
    raw = random_raw("IQ1_M", 8 * len(awkward), rows=8)
    words = fields_of(raw, BLOCKS["IQ1_M"])["scales"]
    words[...] = words & 0x0FFF | np.stack([(awkward >> 4 * k & 15) << 12 for k in range(4)], -1).astype(np.uint16)
    check_decode(raw, "IQ1_M", "awkward scales")
    w = dequantize(raw, "IQ1_M").reshape(8, len(awkward), 256)
    one = np.abs(w[:, awkward == 0x0001]) / np.float32(2.0**-24) * 8
    assert np.array_equal(one, np.rint(one)) and one.max() == 15 * 9 and one.min() <= 7     # (2 s + 1) (v + 1/8) in eighths


def test_decode_awkward_float32_scales():
    awkward = np.array([0x00000001, 0x80000001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000000, 0x80000000], np.uint32)
    raw = random_raw("Q8_K", 8 * len(awkward), rows=8)
    fields_of(raw, BLOCKS["Q8_K"])["d"] = awkward.view(np.float32)
    check_decode(raw, "Q8_K", "awkward scales")


def test_decode_every_scale_of_nvfp4_times_every_value():
    raw = np.zeros((256, 36), np.uint8)
    raw[:, :4], raw[:, 4:] = np.arange(256)[:, None], pack(np.tile(np.arange(16, dtype=np.uint8), 4), n_bits=4, group=8)
    check_decode(raw, "NVFP4", "every scale")
    assert dequantize(raw[0x38], "NVFP4")[:16].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]     # d = 1


def test_q8_k_stores_sums():
    stored = fields_of(quantize(INPUTS["normal"], "Q8_K"), BLOCKS["Q8_K"])
    assert np.array_equal(stored["bsums"], stored["qs"].reshape(64, 4, 16, 16).astype(int).sum(-1)) and (stored["qs"].min(-1) == -127).any()
    for kind in ("zero", "tiny", "huge"):
        x, w = INPUTS[kind], dequantize(quantize(INPUTS[kind], "Q8_K"), "Q8_K")
        assert np.abs(w - x).max() <= np.abs(x).max() / 127 * 0.51
    assert not dequantize(quantize(INPUTS["normal"] * np.float32(1e-40), "Q8_K"), "Q8_K").any()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0"])
def test_decode_every_scale_times_every_level(type_name):
    """All 65,536 halves; each with all 16 nibbles, or all 256 int8 values (in 8 blocks of 32)."""
    block = BLOCKS[type_name]
    if type_name == "Q4_0":
        codes = pack(np.tile(np.arange(16, dtype=np.uint8), 2), n_bits=4, group=16)[None]
    else:
        codes = np.arange(-128, 128, dtype=np.int8).reshape(8, 32)
    scales = np.arange(65_536, dtype=np.uint16).view("<f2")
    records = np.empty((len(scales), len(codes)), block.dtype)
    records["d"], records["qs"] = scales[:, None], codes
    raw = records.view(np.uint8)
    check_decode(raw, type_name, "every scale")
    if type_name == "Q4_0":
        assert np.array_equal(dequantize(raw[0x3C00], "Q4_0")[:16], np.arange(-8, 8))  # d = 1: independent of any oracle


def test_decode_every_exponent_times_every_value():
    """MXFP4: all 256 scales, the denormal ones and 255 among them, with all 16 nibbles."""
    records = np.empty(256, BLOCKS["MXFP4"].dtype)
    records["e"] = np.arange(256)
    records["qs"] = pack(np.tile(np.arange(16, dtype=np.uint8), 2), n_bits=4, group=16)
    raw = records.view(np.uint8)
    check_decode(raw[None], "MXFP4", "every exponent")
    one = dequantize(raw[127 * 17:128 * 17], "MXFP4")         # independent of any oracle: the values of E2M1
    assert one[:16].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert dequantize(raw[:17], "MXFP4")[1] == np.float32(2.0**-128) and dequantize(raw[17:34], "MXFP4")[1] == np.float32(2.0**-127)


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_decode_every_half(type_name):
    raw = np.arange(65_536, dtype="<u2").view(np.uint8).reshape(256, 512)
    check_decode(raw, type_name, "every pattern")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DECODED), st.integers(0, 3), st.data())
def test_decode_any_bytes(type_name, n_blocks, data):
    n = n_blocks * BLOCKS[type_name].n_bytes
    raw = np.frombuffer(data.draw(st.binary(min_size=n, max_size=n)), np.uint8)
    if n:
        check_decode(raw[None], type_name, "any bytes")
    assert dequantize(raw, type_name).shape == (n_blocks * BLOCKS[type_name].elements,)


# --- shapes, views, refusals


@pytest.mark.parametrize("type_name", DECODED)
def test_leading_axes_strides_and_read_only(type_name):
    raw = random_raw(type_name, 16 * 12).reshape(4, 4, -1)
    raw.flags.writeable = False
    rows = raw[::2, 1:3, : 8 * BLOCKS[type_name].n_bytes]
    assert not rows.flags.c_contiguous
    whole = dequantize(np.ascontiguousarray(rows).reshape(-1), type_name)
    assert_same(whole.reshape(2, 2, -1), dequantize(rows, type_name), f"{type_name}, 3-D strided read-only rows")
    assert_same(whole.reshape(4, -1)[0], dequantize(rows[0, 0], type_name), f"{type_name}, one row")


@pytest.mark.parametrize("type_name", DECODED)
@pytest.mark.parametrize("shape", [(600_000,), (3, 300_032), (2, 350, 1024)], ids=["one row", "long rows", "3-D"])
def test_chunks_join_without_seam(type_name, shape):
    block = BLOCKS[type_name]
    lead, n_blocks = shape[:-1], shape[-1] // block.elements
    raw = np.random.default_rng(SEED).integers(0, 256, (*lead, n_blocks * block.n_bytes), dtype=np.uint8)
    ref = gguf_dequantize(raw if lead else raw[None], type_name)
    assert_same(ref.reshape(*lead, -1), dequantize(raw, type_name), f"{type_name} in chunks", block, raw)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "Q6_K", "BF16"])
def test_quantize_in_chunks_and_strides(type_name):
    x = np.random.default_rng(SEED).standard_normal((3, 400, 1024), dtype=np.float32)[:, ::2, :512]
    raw = quantize(x, type_name)
    few = [[quantize(np.ascontiguousarray(plane[i:i + 9]), type_name) for i in range(0, len(plane), 9)] for plane in x]
    assert_same(np.stack([np.concatenate(parts) for parts in few]), raw, f"{type_name}, many rows and few", BLOCKS[type_name])
    for i in range(0, x.shape[1], 25):
        assert_same(quantize(np.ascontiguousarray(x[1, i]), type_name), raw[1, i], f"{type_name}, rows together and alone",
                    BLOCKS[type_name])


@pytest.mark.parametrize("type_name", DECODED)
def test_empty(type_name):
    block = BLOCKS[type_name]
    assert dequantize(np.zeros((0, 2 * block.n_bytes), np.uint8), type_name).shape == (0, 2 * block.elements)
    assert dequantize(np.zeros((3, 0), np.uint8), type_name).shape == (3, 0)
    if type_name in QUANTIZABLE:
        assert quantize(np.zeros((3, 0), np.float32), type_name).shape == (3, 0)
        assert quantize(np.zeros((0, 256), np.float32), type_name).shape == (0, block.row_bytes(256))


@pytest.mark.parametrize("type_name", [t for t in DECODED if BLOCKS[t].n_bytes > 1])
def test_wrong_row_length_is_refused(type_name):
    n_bytes = BLOCKS[type_name].n_bytes
    with pytest.raises(ValueError, match=rf"{type_name}: a row of {2 * n_bytes + 1} bytes .* blocks of {n_bytes}"):
        dequantize(np.zeros((2, 2 * n_bytes + 1), np.uint8), type_name)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="Q4_K: a row of 300 elements is not a whole number of blocks of 256"):
        quantize(np.zeros((2, 300), np.float32), "Q4_K")
    with pytest.raises(ValueError, match="expected rows of float32"):
        quantize(np.zeros((2, 32)), "Q4_0")
    with pytest.raises(ValueError, match="uint8"):
        dequantize(np.zeros((2, 18), np.int8), "Q4_0")
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(np.zeros((2, 36), np.uint8)[:, ::2], "Q4_0")
    with pytest.raises(UnsupportedType, match="cannot dequantize I8; supported: F32, F16"):
        dequantize(np.zeros((1, 74), np.uint8), "I8")
    with pytest.raises(UnsupportedType, match="cannot quantize to Q1_0; supported: .*Q8_0"):
        quantize(np.zeros((1, 128), np.float32), "Q1_0")


@pytest.mark.parametrize("type_name", sorted(QUANTIZABLE - {"F32", "F16", "BF16"}))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_refuses_what_is_not_finite(type_name, bad):
    x = np.ones((2, 512), np.float32)
    x[1, 300] = bad
    with pytest.raises(ValueError, match="cannot quantize"):
        quantize(x, type_name)


# --- encoding, bit for bit


def encoder_inputs():
    rng = np.random.default_rng(SEED)
    normal = rng.standard_normal((64, 1024), dtype=np.float32)
    spikes = np.where(rng.random(normal.shape) < 0.02, normal * 100, normal).astype(np.float32)
    on_grid = rng.integers(-8, 9, normal.shape).astype(np.float32)  # equal magnitudes of both signs; many ties in the codes
    on_grid[:, ::32] = -8
    halves = (rng.integers(-254, 255, normal.shape) / 2).astype(np.float32)  # Q8_0: d = 1, so x.5 is a tie
    halves[:, ::32] = 127
    scattered = np.where(rng.random((64, 32, 1)) < 0.5, normal.reshape(64, 32, 32), 0).reshape(64, 1024).astype(np.float32)
    return {
        "normal": normal,
        "tiny": normal * np.float32(1e-30),
        "near the smallest half": normal * np.float32(1e-7),
        "huge": normal * np.float32(1e30),
        "beyond the largest half": normal * np.float32(1e6),
        "zero": np.zeros((2, 1024), np.float32),
        "negative zero": np.full((2, 1024), -0.0, np.float32),
        "constant": np.repeat(normal[:, :8], 128, axis=1),
        "positive": np.abs(normal) + np.float32(3),
        "spikes": spikes,
        "on grid": on_grid,
        "halves": halves,
        "some blocks zero": scattered,
        "some blocks positive": np.where(scattered == 0, np.abs(normal) + np.float32(3), scattered),
    }


INPUTS = encoder_inputs()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type_name", ENCODED_BY_GGUF)
@pytest.mark.parametrize("kind", sorted(INPUTS))
def test_encode_as_gguf(type_name, kind):
    x = INPUTS[kind]
    assert_same(gguf_quantize(x, type_name), quantize(x, type_name), f"{type_name} encoding, {kind}", BLOCKS[type_name])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type_name", sorted(set(ENCODED_BY_GGUF) - {"F32", "F16", "BF16", "MXFP4"}))
def test_encode_where_ggufs_reciprocal_overflows(type_name):
    """Below 2**-128 gguf-py casts NaN and infinity to integers. The integers may differ; the weights restored must not."""
    x = INPUTS["normal"] * np.float32(1e-40)
    assert np.array_equal(gguf_dequantize(gguf_quantize(x, type_name), type_name), dequantize(quantize(x, type_name), type_name))


def test_encode_where_ggufs_exponent_wraps():
    """MXFP4 below 2**-125: gguf-py's exponent is cast to a byte while negative. Ours is 0, and weights are half a step off at most."""
    x = INPUTS["normal"] * np.float32(2.0**-128)
    raw = quantize(x, "MXFP4")
    restored = dequantize(raw, "MXFP4")
    assert np.abs(restored - x).max() <= 2.0**-128 and not fields_of(raw, BLOCKS["MXFP4"])["e"].any()
    near = np.nextafter(np.float32(32), np.float32(0))          # whose logarithm is 5 in float32
    x = np.full((1, 32), near, np.float32)
    assert_same(gguf_quantize(x, "MXFP4"), quantize(x, "MXFP4"), "MXFP4, just below a power of two")


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_encode_any_float(type_name):
    """Random bit patterns: NaN, infinities, denormals, and values half way between two results."""
    bits = np.random.default_rng(SEED).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[::4] = bits[::4] & np.uint32(0xFFFF0000) | np.uint32(0x8000)  # ties of BF16
    bits[1::4] = bits[1::4] & np.uint32(0xFFFFE000) | np.uint32(0x1000)  # ties of F16
    x = bits.view(np.float32)
    got = quantize(x, type_name)
    ref = gguf_quantize(x, type_name)
    if type_name == "F16":
        assert_same(ref.view(np.float16), got.view(np.float16), "F16 rounding")
    else:
        assert_same(ref, got, "BF16 rounding")
        assert np.isnan(dequantize_bf16(got)[np.isnan(x)]).all()


def test_round_half_away_at_the_edge():
    x = np.array([0.5, -0.5, 2.5, -2.5, np.nextafter(np.float32(0.5), np.float32(0)), 8388607.5, -0.0], np.float32)
    assert round_half_away(x).tolist() == [1, -1, 3, -3, 0, 8388608, 0]


@pytest.mark.filterwarnings("error")
def test_reciprocal_is_defined_everywhere():
    d = np.array([0, -0.0, 2, -4, 1e-40, -1e-45, 2.0**-127], np.float32)
    assert reciprocal(d).tolist() == [0, 0, 0.5, -0.25, 0, 0, 2.0**127]
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="cannot quantize"):
            reciprocal(np.array([1, bad], np.float32))


@pytest.mark.parametrize("type_name", SCALED)
def test_products_are_exact(type_name):
    """What codecs.py promises: without the minimum, a weight over its d is an integer (of eighths in IQ1 and IQ2, quarters in IQ3_XXS), so
    no product was rounded."""
    raw = random_raw(type_name, 4096)
    records = fields_of(raw, BLOCKS[type_name])
    scale, *minimum = SCALE_FIELDS[type_name]
    records[scale] = np.random.default_rng(SEED).normal(size=records.shape).astype(np.float16)
    for name in minimum:
        records[name] = 0
    w = dequantize(raw, type_name).reshape(*records.shape, -1).astype(np.float64)
    codes = w / records[scale].astype(np.float64)[..., None]
    step = {"IQ3_XXS": 4, "IQ3_S": 1}.get(type_name, 8 if type_name.startswith("IQ") else 1)
    assert np.array_equal(step * codes, np.rint(step * codes)) and np.abs(codes).max() >= {"Q1_0": 1, "TQ1_0": 1, "Q2_0": 2,
                                                                                             "TQ2_0": 2}.get(type_name, 7)


def test_bytes_of_inverts_fields_of():
    raw = random_raw("Q5_1", 64)
    fields = fields_of(raw, BLOCKS["Q5_1"])
    assert_same(raw, bytes_of(BLOCKS["Q5_1"], **{name: fields[name] for name in fields.dtype.names}), "fields stored again")
    x = np.arange(512, dtype=np.float32).reshape(2, 256)
    assert_same(x, rows_of(blocks_of(x, BLOCKS["Q5_1"])), "blocks joined again")


# --- the quantizers that gguf-py does not have: judged by their error


def rms(e):
    return float(np.sqrt(np.mean(np.square(e, dtype=np.float64))))


def divide(a, b):
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def minmax_k(x, top, n_sub=8, most=63):
    """The naive quantizer of Q2_K, Q4_K and Q5_K: minimum to maximum of each sub-block, scales rounded to integers, no search."""
    parts = x.reshape(-1, n_sub, 256 // n_sub)
    low = np.minimum(parts.min(-1), 0)
    scale = (parts.max(-1) - low) / top
    d = (scale.max(-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    dmin = (-low.min(-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    step, offset = (d * np.rint(divide(scale, d)))[..., None], (dmin * np.rint(divide(-low, dmin)))[..., None]
    return (step * np.rint(divide(parts + offset, step)).clip(0, top) - offset).reshape(x.shape)


def absmax(x, codes, n_sub, most):
    """The naive quantizer of superblocks without a minimum: the largest magnitude of a sub-block becomes the lowest code."""
    parts = x.reshape(-1, n_sub, 256 // n_sub)
    scale = np.take_along_axis(parts, np.abs(parts).argmax(-1, keepdims=True), -1)[..., 0] / codes[0]
    d = (np.abs(scale).max(-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    step = (d * np.rint(divide(scale, d)))[..., None]
    ratio = divide(parts, step)[..., None]
    return (step * codes[np.abs(ratio - codes).argmin(-1)]).reshape(x.shape)


def absmax_iq4_nl(x):
    parts = x.reshape(-1, 32)
    d = np.take_along_axis(parts, np.abs(parts).argmax(-1, keepdims=True), -1) / IQ4[0]
    return (d * IQ4[np.abs(divide(parts, d)[..., None] - IQ4).argmin(-1)]).reshape(x.shape)


IQ4 = np.array(oracle.IQ4_NL.kvalues, np.float32)
NAIVE = {"Q2_K": lambda x: minmax_k(x, 3, 16, 15), "Q4_K": lambda x: minmax_k(x, 15), "Q5_K": lambda x: minmax_k(x, 31),
         "Q3_K": lambda x: absmax(x, np.arange(-4, 4, dtype=np.float32), 16, 31), "IQ4_XS": lambda x: absmax(x, IQ4, 8, 31),
         "Q6_K": lambda x: absmax(x, np.arange(-32, 32, dtype=np.float32), 16, 127), "IQ4_NL": absmax_iq4_nl}

# RMS error on standard normals, measured with this seed; that of llama.cpp is ggml_quantize_chunk's without an importance matrix:
#            Q2_K    Q3_K    Q4_K    Q5_K    Q6_K    IQ4_NL  IQ4_XS
# naive      0.3293  0.1553  0.0784  0.0382  0.0188  0.0800  0.0802
# ours       0.2699  0.1440  0.0707  0.0349  0.0172  0.0734  0.0742
# llama.cpp  0.2975  0.1513  0.0714  0.0361  0.0177  0.0763  0.0768
BOUND = {"Q2_K": 0.2705, "Q3_K": 0.1445, "Q4_K": 0.0712, "Q5_K": 0.0352, "Q6_K": 0.0174, "IQ4_NL": 0.0740, "IQ4_XS": 0.0747}
RATIO = {"Q2_K": 0.84, "Q3_K": 0.93, "Q4_K": 0.92, "Q5_K": 0.93, "Q6_K": 0.93, "IQ4_NL": 0.93, "IQ4_XS": 0.93}


@pytest.mark.parametrize("type_name", SEARCHED)
def test_search_error_on_normals(type_name):
    x = np.random.default_rng(SEED).standard_normal((256, 1024), dtype=np.float32)
    ours, naive = rms(dequantize(quantize(x, type_name), type_name) - x), rms(NAIVE[type_name](x) - x)
    print(f"{type_name}: ours {ours:.5f}, naive {naive:.5f}")
    assert ours < BOUND[type_name] and ours < RATIO[type_name] * naive


@pytest.mark.parametrize("type_name", SEARCHED)
@pytest.mark.parametrize("kind", ["spikes", "positive", "on grid", "some blocks zero", "some blocks positive"])
def test_search_error_is_below_naive_elsewhere(type_name, kind):
    x = INPUTS[kind]
    ours, naive = rms(dequantize(quantize(x, type_name), type_name) - x), rms(NAIVE[type_name](x) - x)
    print(f"{type_name}, {kind}: ours {ours:.5f}, naive {naive:.5f}")
    assert ours <= naive


@pytest.mark.parametrize("type_name", ["Q2_K", "Q4_K", "Q5_K"])
@pytest.mark.parametrize("kind", ["normal", "positive", "some blocks positive"])
def test_search_stores_no_negative_minimum_scale(type_name, kind):
    """A negative dmin would decode here; ggml never writes one, so no other engine has been tried on it."""
    assert (fields_of(quantize(INPUTS[kind], type_name), BLOCKS[type_name])["dmin"] >= 0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type_name", SEARCHED)
def test_search_scale_of_the_data_does_not_matter(type_name):
    """Times a power of two within float16's normal range of scales, the error is the same power of two larger."""
    x = INPUTS["normal"]
    base = rms(dequantize(quantize(x, type_name), type_name) - x)
    for factor in (np.float32(2**-4), np.float32(2**8)):
        y = x * factor
        assert rms(dequantize(quantize(y, type_name), type_name) - y) == pytest.approx(base * factor, rel=1e-3)


# Half a step of the scale, relative to the largest; a whole one where a scale of the other sign has one step less.
SCALE_STEP = {"Q2_K": 1 / 30, "Q3_K": 1 / 32, "Q4_K": 1 / 126, "Q5_K": 1 / 126, "Q6_K": 1 / 126, "IQ4_NL": 1 / 2048, "IQ4_XS": 1 / 32}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type_name", SEARCHED)
def test_search_edges(type_name):
    for kind in ("zero", "negative zero", "tiny"):
        assert np.abs(dequantize(quantize(INPUTS[kind], type_name), type_name)).max() < 1e-29
    # Constant sub-blocks: the one step left is that of the scale or minimum.
    constant = INPUTS["constant"].reshape(-1, 256)
    restored = dequantize(quantize(constant, type_name), type_name)
    assert (np.abs(restored - constant).max(axis=-1) < 1.02 * SCALE_STEP[type_name] * np.abs(constant).max(axis=-1)).all()
    with pytest.raises(ValueError, match="cannot quantize"):
        quantize(INPUTS["huge"], type_name)


@pytest.mark.parametrize("type_name", SEARCHED)
def test_search_is_exact_on_what_it_can_hold(type_name):
    """Weights of the form (d * s) * q - (dmin * m), the codes used to both ends in each sub-block: nothing is lost."""
    rng = np.random.default_rng(SEED)
    if type_name in ("Q2_K", "Q4_K", "Q5_K"):
        top, n_sub, most = {"Q2_K": (3, 16, 15), "Q4_K": (15, 8, 63), "Q5_K": (31, 8, 63)}[type_name]
        q = np.tile(np.arange(256 // n_sub) % (top + 1), (32, n_sub, 1))
        s, m = rng.integers(most // 3, most + 1, (32, n_sub, 1)), rng.integers(most // 3, most + 1, (32, n_sub, 1))
        s[:, 0], m[:, 0] = most, most
        x = q * s * 2.0**-10 - m * 2.0**-8
    else:
        codes, n_sub, lowest = {"Q3_K": (np.arange(-4, 4), 16, -32), "Q6_K": (np.arange(-32, 32), 16, -128),
                                 "IQ4_NL": (IQ4, 8, -1), "IQ4_XS": (IQ4, 8, -32)}[type_name]
        q = codes[np.concatenate([np.zeros((32, n_sub, 1), int), rng.integers(0, len(codes), (32, n_sub, 256 // n_sub - 1))], axis=-1)]
        s = rng.integers(-lowest // 2, max(-lowest, 1), (32, n_sub, 1)) if lowest < -1 else 2.0**rng.integers(-4, 5, (32, n_sub, 1))
        s[:, 0] = lowest
        x = q * s * 2.0**-10
    x = x.reshape(32, 256).astype(np.float32)
    assert np.abs(dequantize(quantize(x, type_name), type_name) - x).max() == 0


def test_the_scalar_loop_in_the_docstring_of_q4_k_gives_the_same_weights():
    failed, tried = doctest.testmod(q4_k)
    assert tried >= 4 and not failed
