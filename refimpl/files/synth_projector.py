"""Projectors with the true shapes of the five Gemma 4 models and random weights (synth.py), under llama.cpp's names."""

from collections.abc import Iterator

import numpy as np

from refimpl.formats.gguf import TensorInfo
from refimpl.loading.hf_names import under
from refimpl.loading.towers.names import type_in_projector
from refimpl.model.config import PROJECTOR_ARCHITECTURE

TYPES = {"google-q4_0": "BF16", "bf16": "BF16", "f16": "F16", "f32": "F32", "q8_0": "Q8_0"}      # Google's projectors are BF16
CLIPPED = "attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down"
SMALL, LARGE = (768, 16, 12, 64, 3072), (1152, 27, 16, 72, 4304)      # width, layers, heads, their width, feed-forward width
WIDTHS = {"E2B": 1536, "E4B": 2560, "12B": 3840, "26B-A4B": 2816, "31B": 5376}          # of the text model
HEARS = "E2B", "E4B", "12B"
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def projector_tensors(name: str) -> Shapes:
    """(name, shape) of every tensor of a model's projector, shapes in NumPy's order."""
    width = WIDTHS[name]
    if name == "12B":
        yield from _cells(width)
        yield "mm.a.input_projection.weight", (width, 640)
        return
    yield from _vision(width, *(SMALL if name in HEARS else LARGE), clipped=name in HEARS)
    if name in HEARS:
        yield from _audio(width)


def projector_metadata(name: str) -> dict[str, object]:
    """The `clip.*` keys of a model's projector, as llama.cpp's converter writes them."""
    free, width = name == "12B", WIDTHS[name]
    d, n_layer, n_head, _, n_ff = (width, 0, 0, 0, 0) if free else SMALL if name in HEARS else LARGE
    zeros = np.zeros(3, np.float32)
    keys = {"has_vision_encoder": True, "vision.projector_type": "gemma4uv" if free else "gemma4v", "vision.projection_dim": width,
            "vision.embedding_length": d, "vision.feed_forward_length": n_ff, "vision.block_count": n_layer,
            "vision.attention.head_count": n_head, "vision.attention.layer_norm_epsilon": 1e-6, "vision.image_size": 224,
            "vision.patch_size": 16, "vision.image_mean": zeros, "vision.image_std": zeros + 1}
    if name in HEARS:
        d, n_layer, n_head, n_ff = (640, 0, 0, 0) if free else (1024, 12, 8, 4096)
        keys |= {"has_audio_encoder": True, "audio.projector_type": "gemma4ua" if free else "gemma4a", "audio.projection_dim": width,
                 "audio.embedding_length": d, "audio.feed_forward_length": n_ff, "audio.block_count": n_layer,
                 "audio.attention.head_count": n_head, "audio.attention.layer_norm_epsilon": 1e-6, "audio.num_mel_bins": 128}
    return under(PROJECTOR_ARCHITECTURE, keys) | {"general.type": "mmproj"}


def projector_type(recipe: str, name: str, shape: tuple[int, ...]) -> str:
    """The type of a tensor, as `refimpl convert` and llama.cpp's converter choose it."""
    return type_in_projector(TYPES[recipe], TensorInfo(name, "F32", shape, 0, 0, 0))


def projector_vector(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Contents of a vector. Bounds rarely limit anything; norms of queries and keys are small, as larger ones amplify rounding."""
    if name.endswith(("_min", "_max")):
        return np.full(shape, -8.0 if name.endswith("_min") else 8.0, np.float32)
    low, high = (0.3, 0.5) if name.endswith(("q_norm.weight", "k_norm.weight")) else (-0.1, 0.1) if "bias" in name else (0.5, 1.5)
    return rng.uniform(low, high, shape).astype(np.float32)


def _vision(width: int, d: int, n_layer: int, n_head: int, head_dim: int, n_ff: int, clipped: bool) -> Shapes:
    yield "v.patch_embd.weight", (d, 3, 16, 16)
    yield "v.position_embd.weight", (2, 10_240, d)
    yield "mm.input_projection.weight", (width, d)
    for i in range(n_layer):
        blk, a = f"v.blk.{i}.", n_head * head_dim
        for norm in ("ln1", "attn_post_norm", "ln2", "ffn_post_norm"):
            yield f"{blk}{norm}.weight", (d,)
        for norm in ("attn_q_norm", "attn_k_norm"):
            yield f"{blk}{norm}.weight", (head_dim,)
        for linear, shape in zip(CLIPPED, ((a, d), (a, d), (a, d), (d, a), (n_ff, d), (n_ff, d), (d, n_ff))):
            yield from _linear(blk + linear, shape, clipped)
    if not clipped:
        yield from (("v.std_bias", (d,)), ("v.std_scale", (d,)))


def _linear(stem: str, shape: tuple[int, int], clipped: bool = True) -> Shapes:
    yield f"{stem}.weight", shape
    if clipped:
        yield from ((f"{stem}.{bound}", (1,)) for bound in ("input_min", "input_max", "output_min", "output_max"))


def _audio(width: int) -> Shapes:
    d, n_ff = 1024, 4096
    for i, (n_out, n_in) in enumerate(((128, 1), (32, 128))):
        yield f"a.conv1d.{i}.weight", (n_out, n_in, 3, 3)
        yield f"a.conv1d.{i}.norm.weight", (n_out,)
    yield "a.input_projection.weight", (d, 1024)
    yield "a.pre_encode.out.weight", (1536, d)
    yield "a.pre_encode.out.bias", (1536,)
    yield "mm.a.input_projection.weight", (width, 1536)
    for i in range(12):
        blk = f"a.blk.{i}."
        for norm in ("ffn_norm", "ffn_post_norm", "ffn_norm_1", "ffn_post_norm_1", "attn_pre_norm", "attn_post_norm", "ln2", "conv_norm",
                     "norm_conv"):
            yield f"{blk}{norm}.weight", (d,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out", "conv_pw2"):
            yield from _linear(blk + name, (d, d))
        for name, shape in (("conv_pw1", (2 * d, d)), ("ffn_up", (n_ff, d)), ("ffn_down", (d, n_ff)), ("ffn_up_1", (n_ff, d)),
                            ("ffn_down_1", (d, n_ff))):
            yield from _linear(blk + name, shape)
        yield f"{blk}attn_k_rel.weight", (d, d)
        yield f"{blk}per_dim_scale.weight", (128,)
        yield f"{blk}conv_dw.weight", (d, 5)


def _cells(width: int) -> Shapes:
    yield "v.patch_embd.weight", (width, 6912)
    yield "v.patch_embd.bias", (width,)
    for i, n in ((1, 6912), (2, width), (3, width)):
        yield f"v.patch_norm.{i}.weight", (n,)
        yield f"v.patch_norm.{i}.bias", (n,)
    yield "v.position_embd.weight", (2, 1120, width)
    yield "mm.input_projection.weight", (width, width)
