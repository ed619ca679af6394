"""transformers' tensor names of the parts that see and hear as those of a projector file, as llama.cpp's converter translates them.

Some tensors change in form too: `ADAPT` has what is done to them.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refimpl.formats.checkpoint import Checkpoint, CheckpointError
from refimpl.formats.gguf import TensorInfo
from refimpl.formats.matrix import StoredMatrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import dequantize
from refimpl.loading.hf_names import fitting_type
from refimpl.loading.open import Source

_GLOBAL = {
    "vision_tower.patch_embedder.input_proj.weight": "v.patch_embd.weight",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "vision_tower.std_bias": "v.std_bias",
    "vision_tower.std_scale": "v.std_scale",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "audio_tower.subsample_conv_projection.layer0.conv.weight": "a.conv1d.0.weight",
    "audio_tower.subsample_conv_projection.layer0.norm.weight": "a.conv1d.0.norm.weight",
    "audio_tower.subsample_conv_projection.layer1.conv.weight": "a.conv1d.1.weight",
    "audio_tower.subsample_conv_projection.layer1.norm.weight": "a.conv1d.1.norm.weight",
    "audio_tower.subsample_conv_projection.input_proj_linear.weight": "a.input_projection.weight",
    "audio_tower.output_proj.weight": "a.pre_encode.out.weight",
    "audio_tower.output_proj.bias": "a.pre_encode.out.bias",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
    # of the 12B, as it is saved
    "vision_embedder.patch_dense.weight": "v.patch_embd.weight",
    "vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    **{f"vision_embedder.{theirs}.{part}": f"v.patch_norm.{i}.{part}" for part in ("weight", "bias")
       for i, theirs in ((1, "patch_ln1"), (2, "patch_ln2"), (3, "pos_norm"))},
    "vision_embedder.pos_embedding": "v.position_embd.weight",
}
_VISION = {
    "input_layernorm.weight": "ln1.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "attn_post_norm.weight",
    "pre_feedforward_layernorm.weight": "ln2.weight",
    "post_feedforward_layernorm.weight": "ffn_post_norm.weight",
}
_VISION_MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
_AUDIO = {
    "norm_pre_attn.weight": "attn_pre_norm.weight",
    "self_attn.relative_k_proj.weight": "attn_k_rel.weight",
    "self_attn.per_dim_scale": "per_dim_scale.weight",
    "norm_post_attn.weight": "attn_post_norm.weight",
    "lconv1d.pre_layer_norm.weight": "conv_norm.weight",        # and not the other way round
    "lconv1d.depthwise_conv1d.weight": "conv_dw.weight",
    "lconv1d.conv_norm.weight": "norm_conv.weight",
    "norm_out.weight": "ln2.weight",
    **{f"feed_forward{i}.{theirs}.weight": f"{ours}{number}.weight" for i, number in ((1, ""), (2, "_1"))
       for theirs, ours in (("pre_layer_norm", "ffn_norm"), ("post_layer_norm", "ffn_post_norm"))},
}
_AUDIO_MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.post": "attn_out",
    "lconv1d.linear_start": "conv_pw1", "lconv1d.linear_end": "conv_pw2",
    **{f"feed_forward{i}.{theirs}": f"{ours}{number}" for i, number in ((1, ""), (2, "_1"))
       for theirs, ours in (("ffw_layer_1", "ffn_up"), ("ffw_layer_2", "ffn_down"))},
}
_LAYER = re.compile(r"(?:vision_tower\.encoder|audio_tower)\.layers\.(\d+)\.(.+)")
_PART = re.compile(r"(.+?)(?:\.linear)?\.(weight|input_min|input_max|output_min|output_max)")


def gguf_name(name: str) -> str:
    """The name in a projector file of a tensor of transformers' Gemma4Model or Gemma4UnifiedModel. Raises KeyError for one without."""
    name = name.removeprefix("model.")
    if not (match := _LAYER.fullmatch(name)):
        return _GLOBAL[name]
    vision = name.startswith("vision_tower")
    own, matrices = (_VISION, _VISION_MATRICES) if vision else (_AUDIO, _AUDIO_MATRICES)
    blk = f"{'v' if vision else 'a'}.blk.{match[1]}."
    if match[2] in own:
        return blk + own[match[2]]
    part = _PART.fullmatch(match[2])
    return f"{blk}{matrices[part[1]]}.{part[2]}" if part else matrices[match[2]]


def stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Vectors, position tables, convolutions and the matrix after them are never quantized."""
    return len(shape) < 2 or name in ("v.position_embd.weight", "a.input_projection.weight") or name.startswith("a.conv1d.") \
        or name.endswith(".conv_dw.weight")


def type_in_projector(output_type: str, tensor: TensorInfo | StoredMatrix) -> str:
    """The type of a projector's tensor where a converter makes `output_type` of it ("auto": what it can stay)."""
    if stays_float32(tensor.name, tensor.shape):
        return "F32"
    if tensor.name == "v.patch_embd.weight":
        return "F16" if output_type == "F16" or output_type == "auto" and tensor.type == "F16" else "F32"
    return tensor.type if output_type == "auto" else fitting_type(output_type, tensor.shape[-1])


# ---- tensors in another form

def _planes(x: np.ndarray) -> np.ndarray:
    """(D, row, column, channel) as (D, channel, row, column)."""
    return x.transpose(0, 3, 1, 2)


def _patches(x_DP: np.ndarray) -> np.ndarray:
    side = _side(x_DP.shape[1])
    return _planes(x_DP.reshape(len(x_DP), side, side, 3))


def _cells(x_DP: np.ndarray) -> np.ndarray:
    return _patches(x_DP).reshape(x_DP.shape)


def _cell_norm(x_P: np.ndarray) -> np.ndarray:
    return _cells(x_P[None])[0]


def _softplus(x: np.ndarray) -> np.ndarray:
    """ln(1 + e^x), computed in float64."""
    return np.logaddexp(0, x.astype(np.float64)).astype(np.float32)


def _side(n: int) -> int:
    side = int(round((n / 3) ** 0.5))
    if 3 * side * side != n:
        raise ValueError(f"{n} numbers are no square of pixels with 3 channels")
    return side


ADAPT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "vision_tower.patch_embedder.input_proj.weight": _patches,
    "vision_embedder.patch_dense.weight": _cells,
    "vision_embedder.patch_ln1.weight": _cell_norm,
    "vision_embedder.patch_ln1.bias": _cell_norm,
    "vision_embedder.pos_embedding": lambda x: x.transpose(1, 0, 2),
    "self_attn.per_dim_scale": _softplus,
    "lconv1d.depthwise_conv1d.weight": lambda x: x[:, 0],
}
_NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def adapted(checkpoint: Checkpoint, theirs: str, ours: str) -> Source:
    """A tensor of the directory as a projector file has it. Raises CheckpointError for one that cannot be brought into that form."""
    info, bare = checkpoint.tensors[theirs], theirs.removeprefix("model.")
    layer = _LAYER.fullmatch(bare)
    change = ADAPT.get(layer[2] if layer else bare)
    if change is None:
        return Source(replace(info, name=ours), lambda: checkpoint.raw(theirs))
    if info.type not in _NUMBERS:
        raise CheckpointError(checkpoint.path, info.offset, f"tensor {theirs!r} is {info.type}, expected one of {', '.join(_NUMBERS)}")
    block = "F32" if change is _softplus else info.type

    def numbers() -> np.ndarray:
        raw = checkpoint.raw(theirs)
        return dequantize(raw, info.type).reshape(info.shape) if change is _softplus else raw.view(_NUMBERS[info.type]).reshape(info.shape)

    def read() -> np.ndarray:
        changed = np.ascontiguousarray(change(numbers()))
        return changed.view(np.uint8).reshape(*changed.shape[:-1], -1)

    try:
        shape = change(np.broadcast_to(np.zeros((), np.float32), info.shape)).shape
    except (ValueError, IndexError) as error:
        raise CheckpointError(checkpoint.path, info.offset, f"tensor {theirs!r} has shape {info.shape}: {error}") from None
    n_bytes = int(np.prod(shape)) * BLOCKS[block].n_bytes
    return Source(TensorInfo(ours, block, shape, n_bytes, info.offset, info.part), read)
