"""Files with the true shapes of the Gemma 4 models, drafters and projectors, and random weights: to measure speed and memory without a
download.

Dimensions are those of the published checkpoints. The weights have a realistic scale, and every tensor repeats a few random rows, so that
a 14 GB file is written as fast as the disk allows. Models carry a chat template, so that `chat` runs on them (and answers nonsense).
"""

import itertools
import math
import os
import string
from collections.abc import Iterator

import numpy as np

from refimpl.files import synth_projector
from refimpl.formats.gguf_writer import PLAIN_TYPES, Deferred, write_gguf
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import quantize
from refimpl.loading.hf_names import fitting_type, gguf_metadata, rope_divisors, stays_float32, under
from refimpl.model.config import DRAFTER_ARCHITECTURE
from refimpl.model.drafter import CENTROIDS, ORDERING
from refimpl.progress import Progress, silent
from refimpl.text.templates import GEMMA4_TEMPLATE

N_VOCAB = 262_144
SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = dict(
    vocab_size=N_VOCAB, head_dim=256, rms_norm_eps=1e-6, final_logit_softcapping=30.0, tie_word_embeddings=True, use_double_wide_mlp=False,
    attention_k_eq_v=True, hidden_size_per_layer_input=0, num_kv_shared_layers=0, enable_moe_block=False,
    rope_parameters={SLIDING: {"rope_theta": 1e4}, FULL: {"rope_theta": 1e6, "partial_rotary_factor": 0.25}})
SMALL = dict(attention_k_eq_v=False, hidden_size_per_layer_input=256, sliding_window=512, max_position_embeddings=131_072,
             num_attention_heads=8)
LARGE = dict(sliding_window=1024, max_position_embeddings=262_144)
SHAPES = {      # (settings, sliding layers per full one, layers, key/value heads of full layers)
    "E2B": (COMMON | SMALL | dict(hidden_size=1536, intermediate_size=6144, num_key_value_heads=1, num_kv_shared_layers=20,
                                  use_double_wide_mlp=True), 4, 35, 1),
    "E4B": (COMMON | SMALL | dict(hidden_size=2560, intermediate_size=10_240, num_key_value_heads=2, num_kv_shared_layers=18), 5, 42, 2),
    "12B": (COMMON | LARGE | dict(hidden_size=3840, intermediate_size=15_360, num_attention_heads=16, num_key_value_heads=8), 5, 48, 1),
    "26B-A4B": (COMMON | LARGE | dict(hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8,
                                      enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704), 5, 30, 2),
    "31B": (COMMON | LARGE | dict(hidden_size=5376, intermediate_size=21_504, num_attention_heads=32, num_key_value_heads=16), 5, 60, 4),
}
DRAFTERS = {    # width, feed-forward width, query heads
    "E2B": (256, 2048, 4), "E4B": (256, 2048, 4), "12B": (1024, 8192, 16), "26B-A4B": (1024, 8192, 16), "31B": (1024, 8192, 32),
}
N_CENTROID, WITH_CENTROIDS = 2048, ("E2B", "E4B")
PROJECTORS = {f"{name}-mmproj": name for name in synth_projector.WIDTHS}
UNIFORM = ("q2_k", "q3_k", "iq4_nl", "iq4_xs", "mxfp4")          # every matrix but the embeddings in one type
RECIPES = ("google-q4_0", "unsloth-q4_0", "q4_k_m", *UNIFORM)


def shape_names() -> list[str]:
    """All shapes: the models, `NAME-assistant` for their drafters, `NAME-mmproj` for their projectors."""
    return [*SHAPES, *(f"{name}-assistant" for name in DRAFTERS), *PROJECTORS]


def config_of(name: str, n_layer: int | None = None) -> dict[str, object]:
    """The configuration of a model, in transformers' keys, cut to its first `n_layer` layers (the last of them full).

    Where layers share keys and values, the same share of the remaining layers does. Raises ValueError for an unknown name or a number
    of layers that is not 2 to the model's own.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; choose from {', '.join(shape_names())}")
    settings, n_sliding, whole, n_kv_full = SHAPES[name]
    n_layer = whole if n_layer is None else n_layer
    if not 2 <= n_layer <= whole:
        raise ValueError(f"n_layer={n_layer}: {name} can be cut to 2 to {whole} layers")
    kinds = [FULL if i % (n_sliding + 1) == n_sliding or i == n_layer - 1 else SLIDING for i in range(n_layer)]
    # about the same share of layers without own keys; the last one that has them is a full layer, as llama.cpp expects
    n_own = n_layer - settings["num_kv_shared_layers"] * n_layer // whole
    n_shared = n_layer - min(n_layer, -(-n_own // (n_sliding + 1)) * (n_sliding + 1))
    full = {"head_dim": 512, "num_key_value_heads": n_kv_full}
    return settings | dict(layer_types=kinds, num_kv_shared_layers=n_shared,
                           per_layer_config={i: full for i, kind in enumerate(kinds) if kind == FULL})


def model_tensors(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a model, shapes in NumPy's order."""
    d, e, p = config["hidden_size"], config.get("num_experts"), config["hidden_size_per_layer_input"]
    kinds, n_layer = config["layer_types"], len(config["layer_types"])
    yield "token_embd.weight", (config["vocab_size"], d)
    yield "output_norm.weight", (d,)
    yield "rope_freqs.weight", (256,)
    if p:
        yield "per_layer_token_embd.weight", (config["vocab_size"], n_layer * p)
        yield "per_layer_model_proj.weight", (n_layer * p, d)
        yield "per_layer_proj_norm.weight", (p,)
    for i, kind in enumerate(kinds):
        own = i < n_layer - config["num_kv_shared_layers"]
        width = 512 if kind == FULL else 256
        n_kv = config["per_layer_config"][i]["num_key_value_heads"] if kind == FULL else config["num_key_value_heads"]
        n_ff = config["intermediate_size"] * (2 if config["use_double_wide_mlp"] and not own else 1)
        shapes = {"attn_norm.weight": (d,), "attn_q.weight": (config["num_attention_heads"] * width, d), "attn_q_norm.weight": (width,)}
        if own:
            shapes |= {"attn_k.weight": (n_kv * width, d), "attn_k_norm.weight": (width,)}
            if not (kind == FULL and config["attention_k_eq_v"]):
                shapes |= {"attn_v.weight": (n_kv * width, d)}
        shapes |= {"attn_output.weight": (d, config["num_attention_heads"] * width), "post_attention_norm.weight": (d,)}
        shapes |= feed_forward(d, n_ff)
        if e:
            m = config["moe_intermediate_size"]
            shapes |= {"ffn_gate_inp.weight": (e, d), "ffn_gate_inp.scale": (d,), "pre_ffw_norm_2.weight": (d,),
                       "post_ffw_norm_1.weight": (d,), "post_ffw_norm_2.weight": (d,), "ffn_gate_up_exps.weight": (e, 2 * m, d),
                       "ffn_down_exps.weight": (e, d, m), "ffn_down_exps.scale": (e,)}
        if p:
            shapes |= {"inp_gate.weight": (p, d), "proj.weight": (d, p), "post_norm.weight": (d,)}
        for name, shape in shapes.items():
            yield f"blk.{i}.{name}", shape


def feed_forward(d: int, n_ff: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a dense feed-forward network, its norms, and the scale that closes a layer."""
    return {"ffn_norm.weight": (d,), "ffn_gate.weight": (n_ff, d), "ffn_up.weight": (n_ff, d), "ffn_down.weight": (d, n_ff),
            "post_ffw_norm.weight": (d,), "layer_output_scale.weight": (1,)}


def drafter_tensors(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a drafter: four layers, three sliding and one full, without keys and values of their own."""
    d, n_ff, n_head = DRAFTERS[name]
    target = SHAPES[name][0]["hidden_size"]
    yield "token_embd.weight", (N_VOCAB, d)
    yield "output_norm.weight", (d,)
    yield "rope_freqs.weight", (256,)
    yield "nextn.pre_projection.weight", (d, 2 * target)
    yield "nextn.post_projection.weight", (target, d)
    if name in WITH_CENTROIDS:
        yield CENTROIDS, (N_CENTROID, d)
        yield ORDERING, (N_VOCAB,)
    for i in range(4):
        width = 512 if i == 3 else 256
        shapes = {"attn_norm.weight": (d,), "attn_q.weight": (n_head * width, d), "attn_q_norm.weight": (width,),
                  "attn_output.weight": (d, n_head * width), "post_attention_norm.weight": (d,)} | feed_forward(d, n_ff)
        for tensor, shape in shapes.items():
            yield f"blk.{i}.{tensor}", shape


def drafter_metadata(name: str) -> dict[str, object]:
    """The `gemma4-assistant.*` keys of a drafter."""
    d, n_ff, n_head = DRAFTERS[name]
    settings, _, _, n_kv_full = SHAPES[name]
    n_kv = [settings["num_key_value_heads"]] * 3 + [n_kv_full]
    keys = {
        "block_count": 4, "context_length": settings["max_position_embeddings"], "embedding_length": d,
        "embedding_length_out": settings["hidden_size"], "feed_forward_length": n_ff, "attention.head_count": n_head,
        "attention.head_count_kv": np.array(n_kv, np.int32), "attention.key_length": 512, "attention.value_length": 512,
        "attention.key_length_swa": 256, "attention.value_length_swa": 256, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": settings["sliding_window"], "attention.sliding_window_pattern": np.array([True, True, True, False]),
        "attention.shared_kv_layers": 4, "embedding_length_per_layer_input": 0, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
        "rope.dimension_count": 512, "rope.dimension_count_swa": 256, "nextn_predict_layers": 4}
    return under(DRAFTER_ARCHITECTURE, keys)


def recipe_type(recipe: str, name: str, shape: tuple[int, ...], n_layer: int) -> str:
    """The block type of a tensor under a recipe: as in published files, or one type throughout."""
    if name == ORDERING:
        return "I32"
    if stays_float32(name, shape):
        return "F32"
    if name == "per_layer_model_proj.weight" and recipe != "unsloth-q4_0":
        return "F16"                                    # llama.cpp never quantizes it
    if recipe == "unsloth-q4_0":
        block = "Q4_0"
    elif name in ("token_embd.weight", "per_layer_token_embd.weight"):
        block = "Q6_K"
    elif recipe == "google-q4_0":
        block = "Q4_0"
    elif recipe in UNIFORM:
        block = recipe.upper()
    else:       # llama.cpp's Q4_K_M gives values and down projections of about half of the layers more bits
        i = int(name.split(".")[1]) if name.startswith("blk.") else 0
        more = i < n_layer // 8 or i >= 7 * n_layer // 8 or (i - n_layer // 8) % 3 == 2
        block = "Q6_K" if more and ("attn_v" in name or "ffn_down" in name) else "Q4_K"
    return fitting_type(block, shape[-1])


def random_tensor(name: str, shape: tuple[int, ...], block: str, rng: np.random.Generator) -> np.ndarray | Deferred:
    """Contents of realistic scale: norms near 1, matrices that keep a normed vector's size, 32 random rows over and over."""
    if name == "rope_freqs.weight":
        return rope_divisors(512, COMMON["rope_parameters"][FULL]["partial_rotary_factor"])
    if name == ORDERING:
        return rng.permutation(N_VOCAB).astype(np.int32)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    rows = rng.standard_normal((32, shape[-1])).astype(np.float32) * np.float32(shape[-1] ** -0.5)
    rows = rows.astype(PLAIN_TYPES[block]) if block in PLAIN_TYPES else quantize(rows, block)
    whole = (*shape[:-1], rows.shape[-1])
    return Deferred(whole, rows.dtype, lambda: np.resize(rows, whole))


def vocabulary_metadata() -> dict[str, object]:
    """262,144 tokens with Gemma's special ids in their places: control tokens, bytes from 238 on, then a, b, ..., aa, ab, ..."""
    special = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 105: "<|turn>", 106: "<turn|>", 107: "\n"}
    seen = {255_999: "<|image>", 256_000: "<|audio>", 258_880: "<|image|>", 258_881: "<|audio|>", 258_882: "<image|>",
            258_883: "<audio|>", 258_884: "<|video|>"}
    special |= seen
    special |= {238 + b: f"<0x{b:02X}>" for b in range(256)} | {494: "\u2581"}
    words = itertools.chain.from_iterable(map("".join, itertools.product(string.ascii_lowercase, repeat=n)) for n in itertools.count(1))
    tokens = [special[i] if i in special else f"<unused{i}>" if i < 494 else next(words) for i in range(N_VOCAB)]
    types = np.ones(N_VOCAB, np.int32)
    types[5:238], types[238:494], types[107], types[3], types[[0, 1, 2, 4, 105, 106, *seen]] = 5, 6, 1, 2, 3
    return {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": np.full(N_VOCAB, -1000, np.float32), "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 106, "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.merges": [f"{word[:-1]} {word[-1]}" for i, word in enumerate(tokens)
                                  if i > 494 and len(word) > 1 and i not in seen]}


def synthesise(name: str, path: str | os.PathLike, recipe: str = "google-q4_0", n_layer: int | None = None, seed: int = 0,
               progress: Progress = silent):
    """Writes a file of the shape `name` (see `shape_names`) with types by `recipe` (see RECIPES), cut to `n_layer` layers.

    Raises ValueError for an unknown name, recipe or number of layers; OSError when writing fails, and then leaves no file.
    """
    if name in PROJECTORS:
        _projector(name, path, recipe, n_layer, seed, progress)
        return
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
    target = name.removesuffix("-assistant")
    if name == target or target not in DRAFTERS:
        config = config_of(name, n_layer)
        shapes, metadata, layers = list(model_tensors(config)), gguf_metadata(config), len(config["layer_types"])
    elif n_layer is not None:
        raise ValueError("n_layer: a drafter always has four layers")
    else:
        shapes, metadata, layers = list(drafter_tensors(target)), drafter_metadata(target), 4
    rng = np.random.default_rng(seed)
    types = {tensor: recipe_type(recipe, tensor, shape, layers) for tensor, shape in shapes}
    tensors = [(tensor, types[tensor], random_tensor(tensor, shape, types[tensor], rng)) for tensor, shape in shapes]
    n_bytes = sum(math.prod(shape[:-1]) * BLOCKS[types[tensor]].row_bytes(shape[-1]) for tensor, shape in shapes)
    about = {"general.name": f"synthetic {name}, random contents", "general.quantization_version": 2}
    if name == target:
        about["tokenizer.chat_template"] = GEMMA4_TEMPLATE
    with progress("MB written", n_bytes, 10**6) as advance:
        write_gguf(path, metadata | about | vocabulary_metadata(), tensors, advance)


def _projector(name: str, path: str | os.PathLike, recipe: str, n_layer: int | None, seed: int, progress: Progress):
    if recipe not in synth_projector.TYPES:
        raise ValueError(f"unknown recipe {recipe!r} of a projector; choose from {', '.join(synth_projector.TYPES)}")
    if n_layer is not None:
        raise ValueError("n_layer: a projector has all its layers")
    of, rng, tensors, n_bytes = PROJECTORS[name], np.random.default_rng(seed), [], 0
    for tensor, shape in synth_projector.projector_tensors(of):
        block = synth_projector.projector_type(recipe, tensor, shape)
        make = synth_projector.projector_vector(tensor, shape, rng) if len(shape) == 1 else random_tensor(tensor, shape, block, rng)
        tensors.append((tensor, block, make))
        n_bytes += math.prod(shape[:-1]) * BLOCKS[block].row_bytes(shape[-1])
    with progress("MB written", n_bytes, 10**6) as advance:
        write_gguf(path, synth_projector.projector_metadata(of) | {"general.name": f"synthetic {name}, random contents"}, tensors, advance)
