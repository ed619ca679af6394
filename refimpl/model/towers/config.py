"""The dimensions of the towers, read from the `clip.*` metadata of a projector file (mmproj) and the shapes of its tensors.

Letters of array names here, besides those of model/config.py:

    T patches, cells or frames    P numbers of a patch or cell, 3 * side^2    D tower's width      F feed-forward width
    M mel bins                    J bands of frequency, after convolutions    C channels           U samples of a frame
    I width in front of the projection of sound                               O width of the text model

A *patch* is a square of 16 x 16 pixels; 3 x 3 patches make a soft token. The 12B has no patches: its *cell* is what they would make up.
What files do not say, since all Gemma 4 have the same, is here as constants.
"""

from dataclasses import dataclass

from refimpl.formats.gguf import GGUFError
from refimpl.formats.source import TensorSource
from refimpl.model.config import ARCHITECTURE, DRAFTER_ARCHITECTURE, PROJECTOR_ARCHITECTURE, Keys, architecture_of

POOL = 3                    # patches of a soft token, in each direction
ROPE_BASE = 100.0           # of the rotation by x and y
LAYER_NORM_EPS = 1e-5       # of the 12B's layer norms (PyTorch's default)
AUDIO_EPS = 1e-6            # of all norms of the conformer: old files have another one, which is wrong
BAND = 12                   # frames that a frame attends to, its own included; google-deepmind/gemma has 13
AUDIO_CAP = 50.0            # soft cap of the conformer's scores
BIG = 1 << 20


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer (ViT): `n_layer` layers of `n_head` heads of `head_dim`. `n_positions` rows for x and as many for y."""

    side: int
    n_embd: int
    n_layer: int
    n_head: int
    head_dim: int
    n_ff: int
    n_positions: int
    norm_eps: float
    n_out: int


@dataclass(frozen=True)
class CellConfig:
    """Images without an encoder: cells of `side` x `side` pixels, which one matrix turns into soft tokens."""

    side: int
    n_embd: int
    n_positions: int
    norm_eps: float
    n_out: int


@dataclass(frozen=True)
class ConformerConfig:
    """Sound, `n_mel` numbers a frame: two convolutions with as many `channels`, `n_layer` layers, a matrix to width `n_inner`."""

    n_mel: int
    channels: tuple[int, int]
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_taps: int             # of the convolution in time inside of a layer
    n_inner: int
    n_out: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.n_embd // self.n_head

    @property
    def n_bands(self) -> int:
        """Bands of frequency that two convolutions of stride 2 leave."""
        return -(-self.n_mel // 4)


@dataclass(frozen=True)
class SoundFrameConfig:
    """Sound without an encoder: frames of `n_samples` samples, which one matrix turns into soft tokens."""

    n_samples: int
    norm_eps: float
    n_out: int


@dataclass(frozen=True)
class ProjectorConfig:
    """What a projector has: a part that sees, one that hears, or both. None: it has no such part."""

    vision: VisionConfig | CellConfig | None
    audio: ConformerConfig | SoundFrameConfig | None

    @property
    def n_out(self) -> int:
        """Width of the soft tokens, that of the text model."""
        return (self.vision or self.audio).n_out


def projector_config_from_gguf(file: TensorSource) -> ProjectorConfig:
    """Reads the configuration of a projector. Raises GGUFError naming the key or tensor that is missing, malformed or contradicts another.

    Source: llama.cpp's converter (conversion/gemma.py) and transformers' Gemma4VisionConfig, Gemma4AudioConfig and their Unified twins.
    """
    architecture = architecture_of(file.metadata)
    if architecture in (ARCHITECTURE, DRAFTER_ARCHITECTURE):
        kind, option = ("model", "-m") if architecture == ARCHITECTURE else ("drafter", "-md")
        raise GGUFError(file.path, None, f"this is a {kind} ({architecture}), no projector (clip, a file with mmproj in its name): "
                        f"give it with {option}")
    if architecture != PROJECTOR_ARCHITECTURE:
        raise GGUFError(file.path, None, f"architecture is {architecture!r}; a projector is {PROJECTOR_ARCHITECTURE}")
    keys = Keys(file.metadata, file.path, PROJECTOR_ARCHITECTURE)
    vision = _tower(keys, file, "vision", {"gemma4v": _vision, "gemma4uv": _cells})
    audio = _tower(keys, file, "audio", {"gemma4a": _conformer, "gemma4ua": _sound_frames})
    if vision is None and audio is None:
        keys.fail("has neither clip.has_vision_encoder nor clip.has_audio_encoder")
    if vision and audio and vision.n_out != audio.n_out:
        keys.fail(f"clip.vision.projection_dim is {vision.n_out}, clip.audio.projection_dim {audio.n_out}: expected the same")
    return ProjectorConfig(vision, audio)


def _tower(keys: Keys, file: TensorSource, name: str, readers: dict):
    """The configuration by the reader for the tower's type; None for a file that does not say it has the tower."""
    has = keys.values.get(f"has_{name}_encoder", False)
    if not isinstance(has, bool):
        keys.fail(f"clip.has_{name}_encoder is {has!r}, expected true or false")
    if not has:
        return None
    kind = keys.values.get(f"{name}.projector_type")
    if kind not in readers:
        keys.fail(f"clip.{name}.projector_type is {kind!r}; Gemma 4's is {' or '.join(readers)}: a projector of another model?")
    return readers[kind](keys, file)


def _vision(keys: Keys, file: TensorSource) -> VisionConfig:
    config = VisionConfig(
        side=keys.number("vision.patch_size", 1, 1024), n_embd=keys.number("vision.embedding_length", 1, BIG),
        n_layer=keys.number("vision.block_count", 1, 1024), n_head=keys.number("vision.attention.head_count", 1, BIG),
        head_dim=shape_of(file, "v.blk.0.attn_q_norm.weight", 1)[0], n_ff=keys.number("vision.feed_forward_length", 1, BIG),
        n_positions=shape_of(file, "v.position_embd.weight", 3)[1],
        norm_eps=keys.number("vision.attention.layer_norm_epsilon", 0.0, 1.0, float), n_out=keys.number("vision.projection_dim", 1, BIG))
    if config.head_dim % 4:
        keys.fail(f"heads of {config.head_dim} (v.blk.0.attn_q_norm.weight): expected a multiple of 4, two halves of pairs")
    factor = "vision.projector.scale_factor"
    if factor in keys.values and keys.number(factor, 1, 64) != POOL:
        keys.fail(f"clip.{factor} is {keys.values[factor]}, expected {POOL}")
    return config


def _cells(keys: Keys, file: TensorSource) -> CellConfig:
    return CellConfig(
        side=POOL * keys.number("vision.patch_size", 1, 1024), n_embd=keys.number("vision.embedding_length", 1, BIG),
        n_positions=shape_of(file, "v.position_embd.weight", 3)[1],
        norm_eps=keys.number("vision.attention.layer_norm_epsilon", 0.0, 1.0, float), n_out=keys.number("vision.projection_dim", 1, BIG))


def _conformer(keys: Keys, file: TensorSource) -> ConformerConfig:
    first, second = (shape_of(file, f"a.conv1d.{i}.weight", 4)[0] for i in (0, 1))
    config = ConformerConfig(
        n_mel=keys.number("audio.num_mel_bins", 1, 1024), channels=(first, second), n_embd=keys.number("audio.embedding_length", 2, BIG),
        n_layer=keys.number("audio.block_count", 1, 1024), n_head=keys.number("audio.attention.head_count", 1, BIG),
        n_ff=keys.number("audio.feed_forward_length", 1, BIG), n_taps=shape_of(file, "a.blk.0.conv_dw.weight", 2)[1],
        n_inner=shape_of(file, "a.pre_encode.out.weight", 2)[0], n_out=keys.number("audio.projection_dim", 1, BIG))
    if config.n_embd % config.n_head or config.n_embd % 2:
        keys.fail(f"clip.audio.embedding_length is {config.n_embd}, expected an even multiple of the {config.n_head} heads")
    return config


def _sound_frames(keys: Keys, file: TensorSource) -> SoundFrameConfig:
    return SoundFrameConfig(
        n_samples=keys.number("audio.embedding_length", 1, BIG),
        norm_eps=keys.number("audio.attention.layer_norm_epsilon", 0.0, 1.0, float), n_out=keys.number("audio.projection_dim", 1, BIG))


def shape_of(file: TensorSource, name: str, n_dims: int) -> tuple[int, ...]:
    """The shape of a tensor of `n_dims` dimensions. Raises GGUFError where it is missing or has others."""
    info = file.tensors.get(name)
    if info is None:
        raise GGUFError(file.path, None, f"tensor {name} is missing")
    if len(info.shape) != n_dims:
        raise GGUFError(file.path, info.offset, f"tensor {name} has shape {info.shape}, expected {n_dims} dimensions")
    return info.shape
