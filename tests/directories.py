"""Hugging Face directories of random models: saved by transformers, packed to 4 bits by compressed-tensors, with a small vocabulary."""

import copy
import json
import re

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from shapes import COMMON, PIECES, SHAPES, V, random_model
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
)

ARGS = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
SCHEME = QuantizationScheme(targets=["Linear"], weights=ARGS)
QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
        "observer": "memoryless_minmax"}}}}
SMALL_VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                    position_embedding_size=16, use_clipped_linears=True)
LINEAR = re.compile(r".*(_proj|per_layer_input_gate|per_layer_projection)\.weight")


def change_json(path, **new):
    """Sets keys of a JSON file; None takes one away."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (old | new).items() if v is not None}))


def write_vocabulary(folder, n: int = V):
    """The vocabulary of random models as transformers would keep it."""
    tokens = [*PIECES, *(f"<unused{i}>" for i in range(n - len(PIECES)))][:n]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i]} | flags for i in range(5)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": {p: i for i, p in enumerate(tokens)},
                  "merges": [["t", "h"]]}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
        "pad_token": "<pad>", "mask_token": "<mask>"}))


def save(folder, model, dtype=torch.float32, shard: str = "1GB", old_form: bool = False):
    """Writes a model as transformers does, `old_form` with the configuration of published files, and gives it a vocabulary."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard)      # `to` rounds constants too
    if old_form:
        publish(folder / "config.json")
    write_vocabulary(folder)
    return folder


def publish(place):
    """Rewrites config.json: `global_head_dim` and `num_global_key_value_heads` where transformers 5.22 has `per_layer_config`."""
    config = json.loads(place.read_text())
    text = config.get("text_config", config)
    full = next(iter(text.pop("per_layer_config").values()))
    text |= {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full.get("num_key_value_heads")}
    place.write_text(json.dumps(config))


def multimodal(shape: str, unified: bool):
    """(a model with parts that see and hear around the text model of `random_model`, that text model)."""
    kept = COMMON | SHAPES[shape]
    if unified:
        kept = {k: v for k, v in kept.items() if not k.startswith(("hidden_size_per", "vocab_size_per", "enable_moe"))}
        config = Gemma4UnifiedConfig(text_config=Gemma4UnifiedTextConfig(**kept),
                                     vision_config=dict(patch_size=2, mm_embed_dim=16, mm_posemb_size=4, output_proj_dims=64),
                                     audio_config=dict(audio_embed_dim=16))
        model = Gemma4UnifiedForConditionalGeneration(config)
    else:
        kept["use_bidirectional_attention"] = None if kept.get("hidden_size_per_layer_input") else "vision"
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=Gemma4TextConfig(**kept), vision_config=SMALL_VISION))
    text = random_model(shape)
    missing, unexpected = model.model.language_model.load_state_dict(text.model.state_dict(), strict=False)
    assert not missing and not unexpected
    return model.float(), text


def scales_of(weight: torch.Tensor) -> torch.Tensor:
    """The scale of each group of 32, as the largest weight over 7.5 (compressed-tensors' minmax), in BF16."""
    return (weight.float().abs().reshape(len(weight), -1, 32).amax(-1) / 7.5).clamp(min=2e-7).to(torch.bfloat16)


def pack(name: str, weight: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The three tensors of a packed matrix."""
    state = {"weight": weight.to(torch.bfloat16), "weight_scale": scales_of(weight) if scale is None else scale}
    packed = PackedQuantizationCompressor.compress(state, SCHEME)
    return {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in packed.items()}


def unpack(packed: dict[str, torch.Tensor], scale_dtype=torch.float32) -> torch.Tensor:
    """What compressed-tensors makes of three such tensors, computed in `scale_dtype`."""
    state = {name.rsplit(".", 1)[1]: value for name, value in packed.items()}
    state["weight_scale"] = state["weight_scale"].to(scale_dtype)
    return PackedQuantizationCompressor.decompress(state, SCHEME)["weight"]


def save_w4a16(folder, model, scale_of=lambda name, weight: None):
    """Writes a model in bfloat16 with every linear layer packed to 4 bits, experts one by one; gives `model` the weights that this makes.

    `scale_of(name, weight)` may give the scales.
    """
    save(folder, model, torch.bfloat16)
    out = {}

    def packed(name: str, weight: torch.Tensor) -> torch.Tensor:
        parts = pack(name, weight, scale_of(name, weight))
        out.update(parts)
        return unpack(parts)

    state, new = load_file(folder / "model.safetensors"), {}
    for name, value in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stem, experts = name.rsplit(".", 1)[0], []
            for e, weight in enumerate(value):
                if name.endswith("gate_up_proj"):
                    gate, up = weight.chunk(2)
                    experts.append(torch.cat([packed(f"{stem}.{e}.gate_proj.weight", gate), packed(f"{stem}.{e}.up_proj.weight", up)]))
                else:
                    experts.append(packed(f"{stem}.{e}.down_proj.weight", weight))
            new[name] = torch.stack(experts)
        elif LINEAR.fullmatch(name) and "router" not in name and "per_layer_model_projection" not in name:
            new[name] = packed(name, value)
        else:
            out[name], new[name] = value, value.float()
    save_file(out, folder / "model.safetensors")
    change_json(folder / "config.json", quantization_config=QUANTIZATION)
    missing, unexpected = model.load_state_dict(new, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return folder
