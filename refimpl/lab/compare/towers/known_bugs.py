"""Wrong pictures and sounds: bugs that engines shipped with Gemma 4's towers, each planted as one change of one function.

As ../known_bugs.py, whose `inject` plants them. `seen` says where: an engine, and the number of an issue or pull request (PR) there; "" for
a trap of the equations that nobody has reported.
"""

from dataclasses import dataclass

from refimpl.lab.compare.known_bugs import Bug
from refimpl.loading.projector import Projector
from refimpl.media import mel, patches, sounds
from refimpl.model import gemma4, soft
from refimpl.model.towers import conformer, parts, vision, weights
from refimpl.text import prompt

SMALL, LARGE, UNIFIED = "small", "large", "unified"     # towers of E2B and E4B, of 26B-A4B and 31B, of the 12B


@dataclass(frozen=True)
class TowerBug(Bug):
    """A Bug and where it was seen. `on`: the towers that show it."""

    seen: str = ""

    @property
    def at_load(self) -> bool:
        """Does a projector have to be loaded with the bug in place?"""
        return self.function is weights._conformer_layer


def _bug(function, old: str, new: str, on: str, first: str, kind: str, seen: str) -> TowerBug:
    return TowerBug(function, old, new, on, first, kind, seen)


RESIZE = ".resize((width, height), PIL.Image.Resampling.BICUBIC)"
BAND_KEYS = "relative_SNH = backend.matmul(step.distance_SD, w.relative_AD).reshape(BAND, *shape[1:])"
THIRTEEN = """\
n = config.n_embd // 2
    cos_sin = rope_angles(np.arange(BAND + 1), (1 / power(LONGEST, np.arange(n) / max(n - 1, 1))).astype(np.float32))
    relative_SNH = backend.matmul(np.concatenate(cos_sin[::-1], axis=-1), w.relative_AD).reshape(BAND + 1, *shape[1:])"""

TOWER_BUGS = {
    # the prompt
    "no BOS before a picture": _bug(prompt.encode_parts, 'ids, pending, found = tokenizer.encode(""), [], []',
        "ids, pending, found = [], [], []", SMALL, "ids", "tokens", "eullm PR 184"),
    "no marker before a picture": _bug(prompt.encode_parts, "[begin] * (ids[-1:] != [begin] or bool(pending)) + found[-1].ids",
        "found[-1].ids", SMALL, "ids", "tokens", "mlxcel 436 (parts outside of their places)"),
    "budget fixed at 280": _bug(patches.size_for, "check_budget(tokens)", "tokens = 280", UNIFIED, "ids", "tokens",
        "ollama 17152; mlx-vlm PR 1503"),
    # pixels
    "bilinear": _bug(patches.pixels, "Resampling.BICUBIC", "Resampling.BILINEAR", SMALL, "image0.patches", "other pixels",
        "ollama 17153"),
    "no antialias": _bug(patches.pixels, RESIZE,
        ".transform((width, height), PIL.Image.Transform.EXTENT, (0, 0, *rgb_HWC.shape[1::-1]), PIL.Image.Resampling.BICUBIC)", SMALL,
        "image0.patches", "other pixels", ""),
    "letterbox": _bug(patches.pixels, "PIL.Image.fromarray(rgb_HWC)" + RESIZE,
        "__import__('PIL.ImageOps').ImageOps.pad(PIL.Image.fromarray(rgb_HWC), (width, height), PIL.Image.Resampling.BICUBIC)", LARGE,
        "image0.patches", "other pixels", "llama.cpp (its PAD_CEIL)"),
    "blue before red": _bug(patches.patches, "rgb_HWC.reshape(rows", "rgb_HWC[..., ::-1].reshape(rows", UNIFIED, "image0.patches",
        "colours", ""),
    "patches column by column": _bug(patches.patches, ".swapaxes(1, 2)", ".transpose(2, 0, 1, 3, 4)", SMALL, "image0.patches",
        "permuted rows", ""),
    # the towers that see
    "tables of x and y exchanged": _bug(parts.positions_of, "pos_T2[:, 0]) + table_2SD.expert(1).take(pos_T2[:, 1])",
        "pos_T2[:, 1]) + table_2SD.expert(1).take(pos_T2[:, 0])", UNIFIED, "image0.pos_embd", "", ""),
    "bounds of clipped matrices ignored": _bug(parts.linear,
        "backend.limit(backend.matmul(backend.limit(x_TD, w.in_min, w.in_max), w.matrix_OD), w.out_min, w.out_max)",
        "backend.matmul(x_TD, w.matrix_OD)", SMALL, "image0.Qcur-0", "", "tpu-inference 3355"),
    "frequencies of the whole head": _bug(vision.image_tokens, "rope_frequencies(half, ROPE_BASE, np.ones(half // 2, np.float32))",
        "rope_frequencies(2 * half, ROPE_BASE, np.ones(half, np.float32))[:half // 2]", LARGE, "image0.Qcur_pos-0",
        "rotation in two directions", ""),
    "rotation by y, then by x": _bug(vision.rotate, "x_TNH[..., :half], *step.x_angles", "x_TNH[..., :half], *step.y_angles", LARGE,
        "image0.Qcur_pos-0", "rotation in two directions", ""),
    "patches see earlier ones only": _bug(vision.attention, "backend.attend_all(q_TNH, k_TNH, v_TNH)",
        "np.concatenate([backend.attend_all(q_TNH[t:t + 1], k_TNH[:t + 1], v_TNH[:t + 1]) for t in range(len(q_TNH))])", LARGE,
        "image0.kqv_out-0", "keys in sight", ""),
    "scores of patches divided by sqrt(H)": _bug(vision.attention, "backend.attend_all(q_TNH, k_TNH, v_TNH)",
        "backend.attend_all(q_TNH * np.float32(q_TNH.shape[-1] ** -0.5), k_TNH, v_TNH)", LARGE, "image0.kqv_out-0", "scaled scores",
        ""),
    "GELU by the sigmoid of 1.702 x": _bug(vision.feed_forward, "backend.gated(linear(x_TD, w.gate_FD, backend),",
        "(lambda gate, up: gate / (1 + np.exp(np.float32(-1.702) * gate)) * up)(linear(x_TD, w.gate_FD, backend),", SMALL,
        "image0.ffn_out-0", "", "llama.cpp (no clip.use_gelu in the file)"),
    "sqrt(D) after pooling left out": _bug(vision.image_tokens, " * np.float32(config.n_embd ** 0.5)", "", SMALL, "image0.pooled",
        "constant factor", ""),
    "pooled in float16": _bug(vision.image_tokens, "pool(x_TD, int(pos_T2[:, 0].max()) + 1) * np.float32(config.n_embd ** 0.5)",
        "(pool(x_TD, int(pos_T2[:, 0].max()) + 1) * np.float32(config.n_embd ** 0.5)).astype(np.float16).astype(np.float32)", LARGE,
        "image0.pooled", "rounded", "transformers PR 46277; vLLM 40290; unsloth-zoo PR 931"),
    "not standardized": _bug(vision.image_tokens, "(x_TD - weights.standard.bias_D) * weights.standard.scale_D", "x_TD", LARGE,
        "image0.std_scaled", "skipped step", "gemma-4-swift-mlx 3"),
    "norm behind the projection": _bug(parts.project, "backend.matmul(backend.rms_normalise(x_TD, eps), w_OD)",
        "backend.rms_normalise(backend.matmul(x_TD, w_OD), eps)", SMALL, "image0.projected", "factor per row",
        "llama.cpp PR 23822; vLLM PR 40411; ik_llama.cpp PR 1893"),
    # sound
    "not resampled": _bug(sounds.open_sound, "mono_N if rate == RATE else _resample(mono_N, rate)", "mono_N", SMALL, "ids", "tokens",
        "mlxcel 436"),
    "floor of mel taken as a maximum": _bug(mel.mel_frames, "np.log(magnitudes_FB @ mel_filters() + FLOOR)",
        "np.log(np.maximum(magnitudes_FB @ mel_filters(), FLOOR))", SMALL, "audio0.frames", "floor", "llama.cpp; mlxcel 782"),
    "Hann's window half a sample on": _bug(mel.hann, "np.arange(WINDOW) /", "(np.arange(WINDOW) + 0.5) /", SMALL, "audio0.frames", "",
        "google-deepmind/gemma (differs from transformers)"),
    "a frame for 320 samples, not 321": _bug(mel.n_frames, "(n_samples - 1) // HOP", "n_samples // HOP", SMALL, "audio0.frames",
        "another shape", "mlxcel 782"),
    "power instead of magnitude": _bug(mel.mel_frames, "np.abs(np.fft.rfft(frames_FN * hann(), n=FFT))",
        "np.abs(np.fft.rfft(frames_FN * hann(), n=FFT)) ** 2", SMALL, "audio0.frames", "", ""),
    "13 keys in sight": _bug(conformer.attention, BAND_KEYS, THIRTEEN, SMALL, "audio0.kqv_out-0", "from a position",
        "google-deepmind/gemma, mlx-vlm (differ from transformers)"),
    "per_dim_scale never filled": _bug(weights._conformer_layer, 'take.vector(blk + "per_dim_scale.weight", config.head_dim)',
        'take.vector(blk + "per_dim_scale.weight", config.head_dim) * 0 + np.float32(np.log(2))', SMALL, "audio0.Qcur-0",
        "factor per channel", "llama.cpp PR 21421"),
    "softplus applied twice": _bug(weights._conformer_layer, 'take.vector(blk + "per_dim_scale.weight", config.head_dim)',
        'np.log1p(np.exp(take.vector(blk + "per_dim_scale.weight", config.head_dim)))', SMALL, "audio0.Qcur-0", "factor per channel", ""),
    "conv_norm and norm_conv crossed": _bug(conformer.light_convolution, "gated_TD = backend.glu(",
        "w = replace(w, norm_before_D=w.norm_after_D, norm_after_D=w.norm_before_D); gated_TD = backend.glu(", SMALL, "audio0.conv_out-0",
        "", "llama.cpp PR 21421"),
    # where they enter the text model, and what they see there
    "soft tokens scaled by sqrt(D)": _bug(soft.Soft.fill, "part.x_TD[row]", "part.x_TD[row] * np.float32(x_TD.shape[1] ** 0.5)", SMALL,
        "inp_scaled", "constant factor", ""),
    "soft tokens one place late": _bug(soft.Soft.fill, "part.x_TD[row]", "part.x_TD[row - 1]", LARGE, "inp_scaled", "shifted rows", ""),
    "per-layer table of the placeholder": _bug(gemma4.forward, "np.where(ids_T < 0, PAD, ids_T)",
        "np.where(ids_T < 0, config.n_vocab - 1, ids_T)", SMALL, "inp_per_layer_selected", "another row", ""),
    "images see ahead in E2B and E4B": _bug(Projector.soft_tokens, "self.target.config.looks_ahead_in_images", "True", SMALL, "kqv_out-0",
        "keys in sight", "llama.cpp 28318, PR 28335"),
    "images see ahead in full layers too": _bug(gemma4.forward, "AttentionType.FULL: pos_T + 1", "AttentionType.FULL: with_picture_T",
        LARGE, "kqv_out-{full}", "keys in sight", "llama.cpp PR 28335; transformers 46711, PR 46850; mlx-vlm"),
    "images causal": _bug(soft.Soft.ends, "if part.together:", "if False:", UNIFIED, "kqv_out-0", "keys in sight",
        "llama.cpp PR 24082; vLLM 40106, PR 40534"),
    "sound sees ahead": _bug(soft.Soft.ends, "if part.together:", "if True:", UNIFIED, "kqv_out-0", "keys in sight",
        "llama.cpp 21816, 21820, PR 21824"),
    "images longer than the window causal": _bug(gemma4.forward, "AttentionType.SLIDING: with_picture_T",
        "AttentionType.SLIDING: np.where(with_picture_T - pos_T > config.layers[0].window, pos_T + 1, with_picture_T)", LARGE, "kqv_out-0",
        "keys in sight", "vLLM PR 47217, 50539"),
    "window cut ahead too": _bug(gemma4.forward, "AttentionType.SLIDING: with_picture_T",
        "AttentionType.SLIDING: np.minimum(with_picture_T, pos_T + config.layers[0].window)", LARGE, "kqv_out-0", "keys in sight",
        "google-deepmind/gemma (differs from transformers)"),
    "no window in images": _bug(gemma4.attention, "layer.first_visible(step.pos_T[rows])",
        "np.where(step.end_T[AttentionType.SLIDING][rows] > step.pos_T[rows] + 1, 0, layer.first_visible(step.pos_T[rows]))", LARGE,
        "kqv_out-0", "keys in sight", "transformers 46711, PR 46850; vLLM 47300, PR 47332"),
}
