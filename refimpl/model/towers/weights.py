"""From the tensor names of a projector file to weights named by their role. The only place that knows these names.

Every tensor is used exactly once; any other tensor in the file is an error.
"""

from dataclasses import dataclass, replace

import numpy as np

from refimpl.formats.gguf import GGUFError
from refimpl.formats.matrix import Matrix, StoredMatrix
from refimpl.formats.source import TensorSource
from refimpl.model.backend import Prepared
from refimpl.model.towers.config import CellConfig, ConformerConfig, ProjectorConfig, SoundFrameConfig, VisionConfig
from refimpl.model.weights import Taker

FLOATS = ("F32", "F16", "BF16")
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@dataclass(frozen=True)
class Clipped:
    """A matrix whose inputs and outputs are limited to the range that they had in training: a part of the function."""

    matrix_OD: Prepared
    in_min: np.float32
    in_max: np.float32
    out_min: np.float32
    out_max: np.float32


Linear = Clipped | Prepared


@dataclass(frozen=True)
class VisionLayer:
    """A layer of the ViT: attention and a gated feed-forward network, each between two norms."""

    norm_before_D: np.ndarray
    query_AD: Linear
    key_AD: Linear
    value_AD: Linear
    query_norm_H: np.ndarray
    key_norm_H: np.ndarray
    output_DA: Linear
    norm_after_D: np.ndarray
    norm_before_ffn_D: np.ndarray
    gate_FD: Linear
    up_FD: Linear
    down_DF: Linear
    norm_after_ffn_D: np.ndarray


@dataclass(frozen=True)
class Standardize:
    """What is subtracted from a pooled patch, and what it is multiplied with then."""

    bias_D: np.ndarray
    scale_D: np.ndarray


@dataclass(frozen=True)
class NoStandardize:
    """Pooled patches stay as they are."""


@dataclass(frozen=True)
class VisionWeights:
    """The ViT. `position_2SD`: rows for x, then rows for y. Columns of `patch_DP` are in the order (channel, row, column)."""

    patch_DP: Prepared
    position_2SD: Matrix
    layers: tuple[VisionLayer, ...]
    standard: Standardize | NoStandardize
    projection_OD: Prepared


@dataclass(frozen=True)
class LayerNorm:
    """Weight and bias of a layer norm."""

    weight_D: np.ndarray
    bias_D: np.ndarray


@dataclass(frozen=True)
class CellWeights:
    """Images without an encoder. Columns of `cell_DP`, and numbers of its norm, are in the order (channel, row, column)."""

    norm_cell: LayerNorm
    cell_DP: Prepared
    cell_bias_D: np.ndarray
    norm_embedded: LayerNorm
    position_2SD: Matrix
    norm_positioned: LayerNorm
    projection_OD: Prepared


@dataclass(frozen=True)
class Convolution:
    """3 x 3, of stride 2 in time and frequency, and a layer norm over channels. Columns of `kernel_CK`: (channel, time, frequency)."""

    kernel_CK: Prepared
    norm: LayerNorm


@dataclass(frozen=True)
class FeedForward:
    """Half a step: two matrices between two norms."""

    norm_before_D: np.ndarray
    up_FD: Linear
    down_DF: Linear
    norm_after_D: np.ndarray


@dataclass(frozen=True)
class BandAttention:
    """Attention to the latest frames. `scale_H` multiplies queries; `relative_AD` makes keys of distances."""

    norm_before_D: np.ndarray
    query_AD: Linear
    key_AD: Linear
    value_AD: Linear
    scale_H: np.ndarray
    relative_AD: Prepared
    output_DA: Linear
    norm_after_D: np.ndarray


@dataclass(frozen=True)
class LightConvolution:
    """A convolution in time of each channel on its own, between two matrices. `start_2D`: values, then gates."""

    norm_before_D: np.ndarray
    start_2D: Linear
    kernel_DK: np.ndarray
    norm_after_D: np.ndarray
    end_DD: Linear


@dataclass(frozen=True)
class ConformerLayer:
    """A layer of the conformer."""

    first: FeedForward
    attention: BandAttention
    convolution: LightConvolution
    second: FeedForward
    norm_D: np.ndarray


@dataclass(frozen=True)
class ConformerWeights:
    """The part that hears."""

    convolutions: tuple[Convolution, Convolution]
    input_DJC: Prepared
    layers: tuple[ConformerLayer, ...]
    output_ID: Prepared
    output_bias_I: np.ndarray
    projection_OI: Prepared


@dataclass(frozen=True)
class SoundFrameWeights:
    """Sound without an encoder."""

    projection_OU: Prepared


@dataclass(frozen=True)
class ProjectorWeights:
    """All weights of a projector; None as in ProjectorConfig."""

    vision: VisionWeights | CellWeights | None
    audio: ConformerWeights | SoundFrameWeights | None

    @property
    def tables(self) -> tuple[Matrix, ...]:
        """Matrices of which only rows are looked up."""
        return (self.vision.position_2SD,) if self.vision else ()


def projector_weights_from_gguf(file: TensorSource, config: ProjectorConfig) -> ProjectorWeights:
    """Collects the weights: vectors as arrays, matrices as StoredMatrix, which `prepare_matrices` (model/weights.py) reads.

    Raises GGUFError for a tensor that is missing, unexpected, or has another shape or a type that cannot be read.
    """
    take = Taker(file)
    vision = {VisionConfig: _vision, CellConfig: _cells, type(None): _nothing}[type(config.vision)](take, config.vision)
    audio = {ConformerConfig: _conformer, SoundFrameConfig: _sound_frames, type(None): _nothing}[type(config.audio)](take, config.audio)
    take.finish("a projector of Gemma 4")
    return ProjectorWeights(vision, audio)


def _nothing(take: Taker, config: None) -> None:
    return None


def _linear(take: Taker, stem: str, *shape: int) -> Clipped | StoredMatrix:
    """`stem.weight`, with its four bounds where the file has them. Infinite ones limit nothing."""
    matrix = take.matrix(f"{stem}.weight", *shape)
    if not any(take.has(f"{stem}.{bound}") for bound in BOUNDS):
        return matrix
    bounds = [take.vector(f"{stem}.{bound}", 1)[0] for bound in BOUNDS]
    if not (bounds[0] <= bounds[1] and bounds[2] <= bounds[3]):
        raise GGUFError(take.file.path, None, f"{stem} is limited to {bounds[0]}..{bounds[1]} and {bounds[2]}..{bounds[3]}: not a range")
    return matrix if np.isinf(bounds).all() else Clipped(matrix, *bounds)


def _flat(take: Taker, name: str, *shape: int) -> StoredMatrix:
    """A float tensor of any shape as a matrix of its first dimension and the others together."""
    stored = take.matrix(name, *shape, types=FLOATS)
    return replace(stored, shape=(shape[0], int(np.prod(shape[1:]))),
                   read=lambda: Matrix(stored.read().raw.reshape(shape[0], -1), stored.type))


def _vision(take: Taker, config: VisionConfig) -> VisionWeights:
    d, side = config.n_embd, config.side
    patch = _flat(take, "v.patch_embd.weight", d, 3, side, side)
    standard = NoStandardize()
    if take.has("v.std_bias") or take.has("v.std_scale"):
        standard = Standardize(take.vector("v.std_bias", d), take.vector("v.std_scale", d))
    return VisionWeights(
        patch_DP=patch,
        position_2SD=take.matrix("v.position_embd.weight", 2, config.n_positions, d).read(),
        layers=tuple(_vision_layer(take, config, f"v.blk.{i}.") for i in range(config.n_layer)),
        standard=standard,
        projection_OD=take.matrix("mm.input_projection.weight", config.n_out, d))


def _vision_layer(take: Taker, config: VisionConfig, blk: str) -> VisionLayer:
    d, a, f = config.n_embd, config.n_head * config.head_dim, config.n_ff
    return VisionLayer(
        norm_before_D=take.vector(blk + "ln1.weight", d),
        query_AD=_linear(take, blk + "attn_q", a, d), key_AD=_linear(take, blk + "attn_k", a, d),
        value_AD=_linear(take, blk + "attn_v", a, d),
        query_norm_H=take.vector(blk + "attn_q_norm.weight", config.head_dim),
        key_norm_H=take.vector(blk + "attn_k_norm.weight", config.head_dim),
        output_DA=_linear(take, blk + "attn_out", d, a),
        norm_after_D=take.vector(blk + "attn_post_norm.weight", d),
        norm_before_ffn_D=take.vector(blk + "ln2.weight", d),
        gate_FD=_linear(take, blk + "ffn_gate", f, d), up_FD=_linear(take, blk + "ffn_up", f, d),
        down_DF=_linear(take, blk + "ffn_down", d, f),
        norm_after_ffn_D=take.vector(blk + "ffn_post_norm.weight", d))


def _layer_norm(take: Taker, stem: str, width: int) -> LayerNorm:
    return LayerNorm(take.vector(f"{stem}.weight", width), take.vector(f"{stem}.bias", width))


def _cells(take: Taker, config: CellConfig) -> CellWeights:
    d, p = config.n_embd, 3 * config.side ** 2
    return CellWeights(
        norm_cell=_layer_norm(take, "v.patch_norm.1", p),
        cell_DP=take.matrix("v.patch_embd.weight", d, p),
        cell_bias_D=take.vector("v.patch_embd.bias", d),
        norm_embedded=_layer_norm(take, "v.patch_norm.2", d),
        position_2SD=take.matrix("v.position_embd.weight", 2, config.n_positions, d).read(),
        norm_positioned=_layer_norm(take, "v.patch_norm.3", d),
        projection_OD=take.matrix("mm.input_projection.weight", config.n_out, d))


def _conformer(take: Taker, config: ConformerConfig) -> ConformerWeights:
    first, second = config.channels
    return ConformerWeights(
        convolutions=(_convolution(take, 0, first, 1), _convolution(take, 1, second, first)),
        input_DJC=take.matrix("a.input_projection.weight", config.n_embd, config.n_bands * second),
        layers=tuple(_conformer_layer(take, config, f"a.blk.{i}.") for i in range(config.n_layer)),
        output_ID=take.matrix("a.pre_encode.out.weight", config.n_inner, config.n_embd),
        output_bias_I=take.vector("a.pre_encode.out.bias", config.n_inner),
        projection_OI=take.matrix("mm.a.input_projection.weight", config.n_out, config.n_inner))


def _convolution(take: Taker, i: int, n_out: int, n_in: int) -> Convolution:
    norm = LayerNorm(take.vector(f"a.conv1d.{i}.norm.weight", n_out), np.zeros(n_out, np.float32))
    return Convolution(_flat(take, f"a.conv1d.{i}.weight", n_out, n_in, 3, 3), norm)


def _conformer_layer(take: Taker, config: ConformerConfig, blk: str) -> ConformerLayer:
    d = config.n_embd
    attention = BandAttention(
        norm_before_D=take.vector(blk + "attn_pre_norm.weight", d),
        query_AD=_linear(take, blk + "attn_q", d, d), key_AD=_linear(take, blk + "attn_k", d, d),
        value_AD=_linear(take, blk + "attn_v", d, d),
        scale_H=take.vector(blk + "per_dim_scale.weight", config.head_dim),       # softplus is in the file
        relative_AD=take.matrix(blk + "attn_k_rel.weight", d, d),
        output_DA=_linear(take, blk + "attn_out", d, d),
        norm_after_D=take.vector(blk + "attn_post_norm.weight", d))
    convolution = LightConvolution(                                               # the file's two norms have each other's names
        norm_before_D=take.vector(blk + "conv_norm.weight", d),
        start_2D=_linear(take, blk + "conv_pw1", 2 * d, d),
        kernel_DK=take.matrix(blk + "conv_dw.weight", d, config.n_taps, types=FLOATS).read().float32(),
        norm_after_D=take.vector(blk + "norm_conv.weight", d),
        end_DD=_linear(take, blk + "conv_pw2", d, d))
    return ConformerLayer(_feed_forward(take, config, blk, ""), attention, convolution, _feed_forward(take, config, blk, "_1"),
                          take.vector(blk + "ln2.weight", d))


def _feed_forward(take: Taker, config: ConformerConfig, blk: str, number: str) -> FeedForward:
    d, f = config.n_embd, config.n_ff
    return FeedForward(
        norm_before_D=take.vector(f"{blk}ffn_norm{number}.weight", d),
        up_FD=_linear(take, f"{blk}ffn_up{number}", f, d),
        down_DF=_linear(take, f"{blk}ffn_down{number}", d, f),
        norm_after_D=take.vector(f"{blk}ffn_post_norm{number}.weight", d))


def _sound_frames(take: Taker, config: SoundFrameConfig) -> SoundFrameWeights:
    return SoundFrameWeights(take.matrix("mm.a.input_projection.weight", config.n_out, config.n_samples))
