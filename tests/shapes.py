"""Tiny random Gemma 4 models in the five shapes, built with transformers' own classes, and their GGUF files."""

import numpy as np
import torch
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

import refimpl
from refimpl.formats.gguf import open_gguf
from refimpl.formats.gguf_writer import write_gguf
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.loading.hf_names import drafter_metadata, fitting_type, gguf_metadata, gguf_name, gguf_tensors, stays_float32
from refimpl.model.config import config_from_gguf
from refimpl.model.weights import vocabulary_size

torch.set_num_threads(1)        # for models as small as these, more of them only wait for each other
V = 300
BYTES = [f"<0x{b:02X}>" for b in range(256)]
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, *"abcdefghijklmnopqrstuvwxyz", "\u2581", *"0123456789", "th", "\n"]
COMMON = dict(
    vocab_size=V, hidden_size=64, num_attention_heads=4, head_dim=16, global_head_dim=32, sliding_window=7,
    final_logit_softcapping=30.0, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    hidden_size_per_layer_input=0, vocab_size_per_layer_input=V, tie_word_embeddings=True)


def pattern(n_sliding: int, times: int) -> list[str]:
    return (["sliding_attention"] * n_sliding + ["full_attention"]) * times


SHAPES = {
    # PLE, 5 of 10 layers share keys and values, and those have a double-wide MLP; one key/value head
    "E2B": dict(num_key_value_heads=1, intermediate_size=96, layer_types=pattern(4, 2), num_hidden_layers=10,
                num_kv_shared_layers=5, use_double_wide_mlp=True, hidden_size_per_layer_input=32),
    "E4B": dict(num_key_value_heads=2, intermediate_size=128, layer_types=pattern(5, 2), num_hidden_layers=12,
                num_kv_shared_layers=5, hidden_size_per_layer_input=32),
    "12B": dict(num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True, intermediate_size=128,
                layer_types=pattern(5, 1), num_hidden_layers=6),
    "26B-A4B": dict(num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True, intermediate_size=96,
                    layer_types=pattern(5, 1), num_hidden_layers=6, enable_moe_block=True, num_experts=16, top_k_experts=3,
                    moe_intermediate_size=32),
    "31B": dict(num_key_value_heads=4, num_global_key_value_heads=2, attention_k_eq_v=True, intermediate_size=160,
                layer_types=pattern(5, 2), num_hidden_layers=12),
}


def random_model(shape: str, seed: int = 0, **overrides) -> Gemma4ForCausalLM:
    """A model whose every norm, scale and matrix is random and matters."""
    torch.manual_seed(seed)
    config = Gemma4TextConfig(**COMMON | SHAPES[shape] | overrides)
    config._attn_implementation = config._experts_implementation = "eager"
    model = Gemma4ForCausalLM(config).eval().float()
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        with torch.no_grad():
            if name.endswith("layer_scalar"):
                p.uniform_(0.6, 1.2)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                p.uniform_(0.3, 0.9)          # keeps the scores of a random model from amplifying rounding
            elif p.ndim == 1 and name in dict(model.named_parameters()):
                p.uniform_(0.4, 1.6)
            elif p.ndim >= 2:
                p.normal_(0, 1.5 if "router" in name else p.shape[-1] ** -0.5)
    return model


def state_of(model) -> dict[str, np.ndarray]:
    """Parameters and the layer scalars, as float32 arrays."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()
            if not (name == "lm_head.weight" and model.config.tie_word_embeddings)}


def tokenizer_metadata(tokens: list[str] = PIECES, n: int = V) -> dict[str, object]:
    """A small vocabulary for random models: bytes, letters, one merge."""
    tokens = [*tokens, *(f"<unused{i}>" for i in range(n - len(tokens)))]
    types = [3, 3, 3, 2, 3] + [6] * 256 + [1] * (len(PIECES) - 261) + [5] * (n - len(PIECES))
    return {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.scores": np.zeros(n, np.float32), "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": False}


def write_model(path, model, block: str = "F32", extra: dict | None = None, change=lambda tensors: tensors):
    """Writes `model` as GGUF, all matrices in `block` where it fits. `change` may edit the list of tensors first."""
    config = model.config.to_dict()
    tensors = change(list(gguf_tensors(config, state_of(model), lambda name, shape: block)))
    write_gguf(path, gguf_metadata(config) | tokenizer_metadata() | (extra or {}), tensors)
    return path


def round_to(model, block: str):
    """Gives the transformers model the very weights that a file of `block` holds."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "lm_head.weight" or stays_float32(gguf_name(name), tuple(p.shape)):
                continue
            fit = fitting_type(block, p.shape[-1])
            p.copy_(torch.from_numpy(dequantize(quantize(p.numpy(), fit), fit)))
    return model


def oracle(model, ids) -> dict[str, np.ndarray]:
    """From transformers in float32, eager, without a cache: what the router decides, every layer's output, and the logits.

    The router's weights and the per-layer inputs are compared on their own because the layer's output does not depend on their
    scale: the norm after them removes any common factor.
    """
    values = {}

    def keep(name, pick):
        return lambda module, args, out: values.__setitem__(name, pick(out).detach().numpy().copy())

    hooks = []
    for i, layer in enumerate(model.model.layers):
        if model.config.enable_moe_block:
            hooks += [layer.router.register_forward_hook(keep(f"ffn_moe_topk-{i}", lambda out: out[2])),
                      layer.router.register_forward_hook(keep(f"ffn_moe_weights-{i}", lambda out: out[1]))]
        hooks.append(layer.register_forward_hook(keep(f"l_out-{i}", lambda out: out[0])))
    if model.config.hidden_size_per_layer_input:
        with torch.no_grad():
            tokens = torch.tensor([list(ids)])
            x = model.model.embed_tokens(tokens)
            table = model.model.get_per_layer_inputs(tokens, x)
            values["inp_per_layer"] = model.model.project_per_layer_inputs(x, table)[0].numpy()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return values | {"result_output": out.logits[0].numpy()}


def prompt(n: int = 40, seed: int = 1) -> list[int]:
    """<bos> and random ids: six windows long."""
    return [2, *np.random.default_rng(seed).integers(5, V, n - 1).tolist()]


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest value; infinite where the shapes differ."""
    assert np.isfinite(theirs).all()
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def reference(path=None, **options):
    """The model in the reference: exact by default."""
    return refimpl.load(path, backend="reference", **options)


def opened(path):
    """(file, configuration) of a model's file."""
    file = open_gguf(path)
    return file, config_from_gguf(file.metadata, file.tensors.keys(), vocabulary_size(file), path)


# ---- drafters

def random_drafter(shape: str, seed: int = 100, n_centroid: int = 0, **overrides) -> Gemma4AssistantForCausalLM:
    """A drafter for `random_model(shape)`, every weight random: three sliding layers and a full one, with `n_centroid` a centroid head."""
    torch.manual_seed(seed)
    kept = {key: value for key, value in (COMMON | SHAPES[shape]).items()
            if not key.startswith(("hidden_size_per", "enable_moe", "num_experts", "top_k_experts", "moe_", "use_double"))}
    text = Gemma4TextConfig(**kept | dict(
        hidden_size=48, intermediate_size=96, layer_types=pattern(3, 1), num_hidden_layers=4, num_kv_shared_layers=4,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, final_logit_softcapping=None) | overrides)
    text._attn_implementation = "eager"
    drafter = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(
        text_config=text, backbone_hidden_size=COMMON["hidden_size"], use_ordered_embeddings=bool(n_centroid),
        num_centroids=n_centroid or 2048, centroid_intermediate_top_k=3)).eval().float()
    with torch.no_grad():
        for name, p in [*drafter.named_parameters(), *drafter.named_buffers()]:
            if name.endswith("layer_scalar"):
                p.uniform_(0.6, 1.2)
            elif name.endswith("q_norm.weight"):
                p.uniform_(0.2, 0.6)
            elif name.endswith("token_ordering"):
                p.copy_(torch.randperm(V))
            elif p.ndim == 1 and name in dict(drafter.named_parameters()):
                p.uniform_(0.4, 1.6)
            elif p.ndim >= 2:
                p.normal_(0, p.shape[-1] ** -0.5)
    return drafter


def write_drafter(path, drafter, block: str = "F32", metadata: dict | None = None, change=lambda tensors: tensors):
    """Writes a drafter as GGUF, as `write_model` does a model, with the vocabulary of random models or the one in `metadata`."""
    vocabulary = tokenizer_metadata() if metadata is None else {k: v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    config = drafter.config.to_dict()
    tensors = change(list(gguf_tensors(dict(config["text_config"]), state_of(drafter), lambda name, shape: block)))
    write_gguf(path, drafter_metadata(config) | vocabulary, tensors)
    return path
