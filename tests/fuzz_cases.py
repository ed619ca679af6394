"""Hostile files, made from a stream of bytes, and the promise that each is held to. Hypothesis and atheris drive the same functions.

The stream is a list of decisions. An exhausted one decides 0, which always means "as it should be": an empty stream makes a valid
file, and a short one is close to it.
"""

import json
import struct
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
from gguf_bytes import ARRAY, BOOL, F32, FORMATS, I32, STRING, U8, U32, U64, gguf, key, string, tensor

import refimpl
from refimpl import GGUFError, TokenizerError
from refimpl.formats.checkpoint import open_checkpoint
from refimpl.formats.gguf import open_gguf
from refimpl.formats.quants.blocks import BLOCKS, TYPE_IDS
from refimpl.model.towers.weights import BOUNDS

MAX_MESSAGE = 1000
LONGS = (0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 2**15, 2**16, 2**20, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61 + 1, 2**62,
         2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-6, 0.5, 1e9, 3.4e38, float("inf"), -float("inf"), float("nan"))
TEXTS = (b"", b"a", b" ", b"a b", b"a  b", b"th", b"<0x41>", b"<0x-1>", b"<eos>", b"<turn|>", b"<|x|>", b"\xff", b"\xed\xa0\x80", b"\0",
         "\u2581".encode(), "\ufeff".encode(), "\U0001f642".encode(), b"\n", b"x" * 70, b"y" * 3000, b"{{ 1 }}", b"gemma4", b"llama", b"32",
         b"\x1b[31m", "\u2028".encode())
NAMES = (b"general.alignment", b"split.count", b"split.no", b"general.name", b"gemma4.new", b"tokenizer.ggml.suppress_tokens",
         b"general.sampling.temp", b"tokenizer.ggml.scores", b"tokenizer.chat_template", b"k", b"\xff", b"n" * 100)


class Stream:
    """Decisions out of bytes."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, n: int) -> int:
        """0 to n - 1."""
        size = 1 if n <= 256 else 2 if n <= 65536 else 4
        taken = self.data[self.at:self.at + size]
        self.at += size
        return int.from_bytes(taken, "little") % n

    def pick(self, items):
        return items[self.number(len(items))]

    def blob(self) -> bytes:
        n = self.number(40)
        self.at += n
        return self.data[self.at - n:self.at]


# Valid models ------------------------------------------------------------------------------------------------------------------

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn|>", "<|turn>", *(f"<0x{b:02X}>" for b in range(256)), *"abtehin", "\u2581", "th",
          "the", "\n", "<|x|>", "<td>"]
V, D, H, FF = len(PIECES), 32, 16, 32
MERGES = ["t h", "th e"]
VOCABULARY = {
    "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.token_type": np.array([3, 3, 3, 2, 3, 3] + [6] * 256 + [1] * (V - 264) + [4, 4], np.int32),
    "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3}
MODELS = {      # what differs: kinds of layers, shared ones, per-layer inputs, experts, values that are keys, the type of the matrices
    "dense": dict(kinds=(1, 0), block="F32"),
    "experts": dict(kinds=(1, 0), n_expert=4, keys_are_values=True, block="Q4_0"),
    "per-layer": dict(kinds=(1, 0, 1), n_shared=1, n_ple=32, block="Q8_0"),
}


def model(kinds, block, n_shared=0, n_ple=0, n_expert=0, keys_are_values=False):
    """(metadata, tensors as name -> (shape, type, bytes)) of a small valid model."""
    n, random = len(kinds), np.random.default_rng(0)
    metadata = {"general.architecture": "gemma4", "general.name": "fuzz"} | {f"gemma4.{k}": v for k, v in {
        "block_count": n, "context_length": 64, "embedding_length": D, "feed_forward_length": FF, "attention.head_count": 2,
        "attention.head_count_kv": 1, "attention.key_length": H, "attention.key_length_swa": H,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 8, "attention.shared_kv_layers": n_shared,
        "attention.sliding_window_pattern": np.array(kinds, bool), "embedding_length_per_layer_input": n_ple,
        "rope.freq_base": 1e6, "final_logit_softcapping": 30.0}.items()}
    if n_expert:
        metadata |= {"gemma4.expert_count": n_expert, "gemma4.expert_used_count": 2, "gemma4.expert_feed_forward_length": FF}
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "rope_freqs.weight": (H // 2,)}
    if n_ple:
        shapes |= {"per_layer_token_embd.weight": (V, n * n_ple), "per_layer_model_proj.weight": (n * n_ple, D),
                   "per_layer_proj_norm.weight": (n_ple,)}
    for i in range(n):
        layer = {"attn_norm": (D,), "attn_q": (2 * H, D), "attn_q_norm": (H,), "attn_output": (D, 2 * H), "post_attention_norm": (D,),
                 "ffn_norm": (D,), "ffn_gate": (FF, D), "ffn_up": (FF, D), "ffn_down": (D, FF), "post_ffw_norm": (D,)}
        if i < n - n_shared:
            layer |= {"attn_k": (H, D), "attn_k_norm": (H,)} | ({} if keys_are_values else {"attn_v": (H, D)})
        if n_ple:
            layer |= {"inp_gate": (n_ple, D), "proj": (D, n_ple), "post_norm": (D,)}
        if n_expert:
            layer |= {"post_ffw_norm_1": (D,), "pre_ffw_norm_2": (D,), "post_ffw_norm_2": (D,), "ffn_gate_inp": (n_expert, D),
                      "ffn_gate_up_exps": (n_expert, 2 * FF, D), "ffn_down_exps": (n_expert, D, FF)}
            shapes |= {f"blk.{i}.ffn_gate_inp.scale": (D,), f"blk.{i}.ffn_down_exps.scale": (n_expert,)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return metadata | VOCABULARY, {name: (shape, *values(random, shape, block)) for name, shape in shapes.items()}


def projector(sees, hears):
    """The same of a small valid projector: `sees` "clipped", "standardized" or "cells", `hears` "conformer", "frames" or ""."""
    cells, side, random = sees == "cells", 2, np.random.default_rng(2)
    metadata = {"general.architecture": "clip", "general.type": "mmproj", "general.name": "fuzz", "clip.has_vision_encoder": True,
                "clip.vision.projector_type": "gemma4uv" if cells else "gemma4v", "clip.vision.patch_size": side,
                "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.projection_dim": D, "clip.vision.embedding_length": D,
                "clip.vision.block_count": 0 if cells else 1, "clip.vision.attention.head_count": 0 if cells else 2,
                "clip.vision.feed_forward_length": 0 if cells else FF}
    shapes = {"v.position_embd.weight": (2, 9, D), "mm.input_projection.weight": (D, D)}
    if cells:
        p = 3 * (3 * side) ** 2
        shapes |= {"v.patch_embd.weight": (D, p), "v.patch_embd.bias": (D,)}
        shapes |= {f"v.patch_norm.{i}.{part}": (width,) for i, width in ((1, p), (2, D), (3, D)) for part in ("weight", "bias")}
    else:
        linear = {"attn_q": (D, D), "attn_k": (D, D), "attn_v": (D, D), "attn_out": (D, D), "ffn_gate": (FF, D), "ffn_up": (FF, D),
                  "ffn_down": (D, FF)}
        norms = {"ln1": (D,), "attn_post_norm": (D,), "ln2": (D,), "ffn_post_norm": (D,), "attn_q_norm": (H,), "attn_k_norm": (H,)}
        shapes |= {f"v.blk.0.{name}.weight": shape for name, shape in (linear | norms).items()}
        shapes["v.patch_embd.weight"] = (D, 3, side, side)
        shapes |= {f"v.blk.0.{name}.{bound}": (1,) for name in linear if sees == "clipped" for bound in BOUNDS}
        shapes |= {"v.std_bias": (D,), "v.std_scale": (D,)} if sees == "standardized" else {}
    if hears:
        metadata |= {"clip.has_audio_encoder": True, "clip.audio.projector_type": "gemma4a" if hears == "conformer" else "gemma4ua",
                     "clip.audio.projection_dim": D, "clip.audio.embedding_length": D if hears == "conformer" else 40,
                     "clip.audio.block_count": 1, "clip.audio.attention.head_count": 2, "clip.audio.feed_forward_length": FF,
                     "clip.audio.num_mel_bins": 16, "clip.audio.attention.layer_norm_epsilon": 1e-6}
        shapes["mm.a.input_projection.weight"] = (D, 40)
    if hears == "conformer":
        layer = {"attn_pre_norm": (D,), "attn_q": (D, D), "attn_k": (D, D), "attn_v": (D, D), "per_dim_scale": (H,),
                 "attn_k_rel": (D, D), "attn_out": (D, D), "attn_post_norm": (D,), "conv_norm": (D,), "conv_pw1": (2 * D, D),
                 "conv_dw": (D, 5), "norm_conv": (D,), "conv_pw2": (D, D), "ln2": (D,)}
        layer |= {f"ffn_{name}{n}": shape for n in ("", "_1") for name, shape in
                  {"norm": (D,), "up": (FF, D), "down": (D, FF), "post_norm": (D,)}.items()}
        shapes |= {"a.conv1d.0.weight": (4, 1, 3, 3), "a.conv1d.0.norm.weight": (4,), "a.conv1d.1.weight": (8, 4, 3, 3),
                   "a.conv1d.1.norm.weight": (8,), "a.input_projection.weight": (D, 4 * 8), "a.pre_encode.out.weight": (40, D),
                   "a.pre_encode.out.bias": (40,)} | {f"a.blk.0.{name}.weight": shape for name, shape in layer.items()}
    tensors = {name: (shape, *values(random, shape, "F32")) for name, shape in shapes.items()}
    tensors |= {name: (shape, block, np.float32([-2 if name.endswith("min") else 2]).tobytes())
                for name, (shape, block, _) in tensors.items() if name.endswith(BOUNDS)}
    return metadata, tensors


def values(random, shape, block):
    """(type, bytes) of random weights."""
    from refimpl.formats.quants.codecs import quantize

    x = random.uniform(0.5, 1, shape) if len(shape) == 1 else random.normal(0, shape[-1] ** -0.5, shape)
    block = block if len(shape) > 1 else "F32"
    return block, quantize(x.astype(np.float32), block).tobytes()


def record(name: str, value) -> bytes:
    """A metadata record as a writer would make it."""
    if isinstance(value, np.ndarray):
        item = {"b": BOOL, "i": I32, "u": U32, "f": F32}[value.dtype.kind]
        return array(name, item, len(value), value.tobytes())
    if isinstance(value, list):
        return array(name, STRING, len(value), b"".join(string(item) for item in value))
    return key(name, {str: STRING, bool: BOOL, int: U32, float: F32}[type(value)], value)


def array(name, item, count, body) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", item, count) + body)


def encoded(metadata, tensors):
    return metadata, {key: record(key, value) for key, value in metadata.items()}, tensors


BASES = {name: encoded(*model(**kind)) for name, kind in MODELS.items()}
PROJECTORS = {name: encoded(*projector(*kind)) for name, kind in {
    "small": ("clipped", "conformer"), "large": ("standardized", ""), "unified": ("cells", "frames")}.items()}
NUMBER_OF = {name: number for number, name in TYPE_IDS.items()}


# Hostile GGUF files ------------------------------------------------------------------------------------------------------------


def make_gguf(data: bytes, bases: dict = BASES) -> bytes:
    """A file: a valid model (or projector) changed in a few places, or nonsense in well-formed frames; then perhaps some of its bytes."""
    stream = Stream(data)
    how = stream.number(10)
    raw = nonsense(stream) if how == 9 else changed_model(stream, bases, weights_only=how in (1, 2, 3))
    return changed_bytes(stream, raw) if how in (7, 8) else raw


def laid_out(tensors) -> tuple[list[list], bytearray]:
    """(name, dimensions, type and offset of every tensor, the bytes of all)."""
    entries, offset, data = [], 0, []
    for name, (shape, block, raw) in tensors.items():
        entries.append([name, list(reversed(shape)), NUMBER_OF[block], offset])
        data += [raw, bytes(-len(raw) % 32)]
        offset += len(raw) + len(data[-1])
    return entries, bytearray(b"".join(data))


def changed_model(stream: Stream, bases: dict, weights_only: bool) -> bytes:
    metadata, records, tensors = bases[stream.pick(list(bases))]
    keys, (entries, body), header = dict(records), laid_out(tensors), {}
    for _ in range(stream.number(4)):
        if weights_only or stream.number(4) == 3:
            change_weights(stream, body, entries)
        elif stream.number(2):
            change_tensor(stream, entries, header)
        else:
            change_key(stream, keys, metadata, header)
    return gguf(list(keys.values()), [tensor(*entry) for entry in entries], bytes(body), **header)


def change_weights(stream, body, entries):
    """Some weights, or the whole tensor, become what no training makes."""
    entry = stream.pick(entries)
    word = stream.pick((b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\xff\xff", b"\x01\0\0\0", b"\0\x7c\0\x7c", b"\0\xfc\xff\xff",
                        b"\xff\x7f\x7f\x7f"))
    for _ in range(1 + stream.number(4)):
        place = min(len(body) - 4, entry[3] + 4 * stream.number(64))
        body[place:place + 4] = word
    if stream.number(4) == 3:
        length = min(2048, len(body) - entry[3]) // 4 * 4
        body[entry[3]:entry[3] + length] = word * (length // 4)


def change_key(stream, keys, metadata, header):
    """A key goes, comes twice, or has another value, type or length."""
    name, what = stream.pick(list(keys)), stream.number(9)
    value = metadata.get(name)
    if what == 0:
        keys[name] = odd_value(stream, name)
    elif what == 1:
        del keys[name]
    elif what == 2:
        keys[name + " again"] = keys[name]
    elif what == 3:
        keys[name] = key(name, stream.number(14), stream.blob())
    elif what == 4:
        raw = bytearray(keys[name])
        raw[stream.number(len(raw))] = stream.number(256)
        keys[name] = bytes(raw)
    elif what == 5:
        extra = stream.pick(NAMES)
        keys[f"extra {len(keys)}"] = odd_value(stream, extra)
    elif what == 6:
        header["n_keys"] = stream.pick((len(keys) + 1, len(keys) - 1, *LONGS))
    elif isinstance(value, list):
        items = [item.encode() for item in value]
        for _ in range(1 + stream.number(3)):
            items[stream.number(len(items))] = stream.pick(TEXTS) if stream.number(2) else stream.pick(items)
        keys[name] = array(name, STRING, len(items), b"".join(map(string, items)))
    elif isinstance(value, np.ndarray):
        changed = value.astype(np.int64)
        changed[stream.number(len(changed))] = stream.pick((0, 1, 2, 4, 7, -1, 2**31))
        changed = changed[:stream.number(len(changed))] if stream.number(4) == 3 else changed
        keys[name] = array(name, 11, len(changed), changed.tobytes())
    elif isinstance(value, int):
        keys[name] = key(name, U32, stream.pick((value + 1, max(value - 1, 0), 2 * value, 0, 1, *LONGS[:18])) % 2**32)


def odd_value(stream, name) -> bytes:
    kind = stream.pick((U32, U64, I32, F32, STRING, BOOL, ARRAY, 12, U8, 11))
    if kind == STRING:
        return key(name, STRING, stream.pick(TEXTS))
    if kind == ARRAY:
        item, count = stream.number(14), stream.pick((0, 1, 2, 3, V, *LONGS))
        body = b"".join(string(stream.pick(TEXTS)) for _ in range(3)) if item == STRING else stream.blob() * (1 + stream.number(30))
        return array(name, item, count, body)
    if kind in (F32, 12):
        return key(name, kind, stream.pick(FLOATS))
    size = struct.calcsize(FORMATS[kind])
    return key(name, kind, (stream.pick(LONGS) % 256**size).to_bytes(size, "little"))


def change_tensor(stream, entries, header):
    """A tensor goes, comes twice, or has another name, shape, type or place."""
    i, what = stream.number(len(entries)), stream.number(9)
    entry = entries[i]
    if what == 0 and entry[1]:
        entry[1][stream.number(len(entry[1]))] = stream.pick((D, V, H, 2 * D, *LONGS))
    elif what == 1:
        del entries[i]
    elif what == 2:
        entries.append(list(entry))
    elif what == 3:
        fits = [NUMBER_OF[name] for name, block in BLOCKS.items() if name in NUMBER_OF and D % block.elements == 0]
        entry[2] = stream.pick((*NUMBER_OF.values(), 4, 99, 2**32 - 1) if stream.number(2) else fits)
    elif what == 4:
        entry[3] = stream.pick((entries[0][3], entry[3] + 32, entry[3] + 1, *LONGS))
    elif what == 5:
        entry[0] = stream.pick((b"", b"\xff", b"w" * 64, b"output.weight", b"blk.0.attn_qkv.weight", b"blk.1.ffn_gate_inp.weight",
                                b"blk.9.attn_q.weight", b"blk.-1.attn_q.weight", b"per_layer_token_embd.weight"))
    elif what == 6:
        entry[1] = [stream.pick((D, V, 1, *LONGS)) for _ in range(stream.number(6))]
    elif what == 7:
        entry.append(stream.pick((0, 5, *LONGS[:18])) % 2**32)             # n_dims
        del entry[5:]
    else:
        header["n_tensors"] = stream.pick((len(entries) + 1, len(entries) - 1, *LONGS))


def nonsense(stream) -> bytes:
    keys = [odd_value(stream, stream.pick(NAMES) + bytes([97 + i])[:stream.number(2)]) for i in range(stream.number(6))]
    entries = [tensor(stream.pick(NAMES), [stream.pick((1, 32, *LONGS)) for _ in range(stream.number(6))], stream.number(45),
                      stream.pick((0, 32, 64, *LONGS)), stream.pick((None, None, 1, 5, 2**32 - 1))) for _ in range(stream.number(4))]
    return gguf(keys, entries, stream.blob() * 10)


def changed_bytes(stream, raw: bytes) -> bytes:
    """Overwritten, cut out, put in, or cut off; most of it ahead of the weights."""
    raw = bytearray(raw or b"\0")
    for _ in range(1 + stream.number(4)):
        place, what = stream.number(min(len(raw), 8192) if stream.number(4) else len(raw)), stream.number(6)
        if what < 3:
            raw[place] = stream.number(256)
        elif what == 3:
            raw[place:place + 8] = stream.pick(LONGS).to_bytes(8, "little")
        elif what == 4:
            raw[place:place] = stream.blob()
        else:
            del raw[max(1, place):place + 1 + stream.number(9)]
    return bytes(raw[:stream.number(len(raw) + 1)]) if stream.number(8) == 7 else bytes(raw)


# Hostile directories -----------------------------------------------------------------------------------------------------------

DRAFTER_CONFIG = {
    "backbone_hidden_size": D, "centroid_intermediate_top_k": 3, "model_type": "gemma4_assistant", "num_centroids": 9,
    "tie_word_embeddings": True, "use_ordered_embeddings": False,
    "text_config": {
        "attention_k_eq_v": False, "final_logit_softcapping": None, "head_dim": H, "hidden_size": D, "hidden_size_per_layer_input": 0,
        "intermediate_size": FF, "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 64,
        "num_attention_heads": 2, "num_experts": None, "num_hidden_layers": 2, "num_key_value_heads": 1, "num_kv_shared_layers": 2,
        "global_head_dim": H, "rms_norm_eps": 1e-6, "sliding_window": 8, "vocab_size": V, "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}}


def drafter_tensors():
    random, shapes = np.random.default_rng(1), {
        "model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "post_projection.weight": (D, D),
        "pre_projection.weight": (D, 2 * D)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in {
            "input_layernorm.weight": (D,), "layer_scalar": (1,), "mlp.down_proj.weight": (D, FF), "mlp.gate_proj.weight": (FF, D),
            "mlp.up_proj.weight": (FF, D), "post_attention_layernorm.weight": (D,), "post_feedforward_layernorm.weight": (D,),
            "pre_feedforward_layernorm.weight": (D,), "self_attn.o_proj.weight": (D, 2 * H), "self_attn.q_norm.weight": (H,),
            "self_attn.q_proj.weight": (2 * H, D)}.items()}
    return {name: (shape, values(random, shape, "F32")[1]) for name, shape in shapes.items()}


DRAFTER = drafter_tensors()
JSON_VALUES = (None, True, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 0.5, 1e30, "", "x", "F32", "full_attention", [], {}, [[]], [1], [-1, 2],
               {"a": 1}, [0, 10**9], "9" * 100, 10**4000)


def make_directory(data: bytes) -> dict[str, bytes]:
    """File name -> bytes: a valid drafter with changes in config.json, the safetensors header, or the bytes of either."""
    stream = Stream(data)
    config, entries, body = json.loads(json.dumps(DRAFTER_CONFIG)), {}, b""
    for name, (shape, raw) in DRAFTER.items():
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    index = None
    for _ in range(stream.number(4)):
        what = stream.number(5)
        if what < 2:
            change_json(stream, config)
        elif what < 4:
            change_json(stream, entries)
        else:
            index = stream.pick(({"weight_map": {"a": "model.safetensors"}}, {"weight_map": {"a": "../model.safetensors"}},
                                 {"weight_map": {"a": "config.json"}}, {"weight_map": {"a": "."}}, {"weight_map": 3}, 3,
                                 {"weight_map": {"a": 1}}, {"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}},
                                 {"weight_map": {"a": "a\0b"}}))
    header = json.dumps(entries).encode()
    length = stream.pick((len(header) - 1, *LONGS)) if stream.number(8) == 7 else len(header)
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": struct.pack("<Q", length) + header + body}
    if index is not None:
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    if stream.number(3) == 2:
        name = stream.pick(sorted(files))
        files[name] = changed_bytes(stream, files[name])
    return files


def change_json(stream, value):
    """One entry, anywhere in it, goes or becomes another value."""
    while True:
        place = stream.pick(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[place], (dict, list)) and value[place] and stream.number(4):
            value = value[place]
            continue
        if stream.number(5) == 4:
            del value[place]
        elif stream.number(8) == 7 and isinstance(value, dict):
            value[stream.pick(("x", "__metadata__", ""))] = json.loads(json.dumps(value[place]))
        else:
            value[place] = json.loads(json.dumps(stream.pick(JSON_VALUES)))      # a copy: it may be changed in turn
        return


# The promise -------------------------------------------------------------------------------------------------------------------


def loaded(path: Path, backend: str, load, refusals):
    """(what `load` gives, ""), or (None, how far it came): the container is opened first. `refusals`: what loading may raise."""
    try:
        with open_gguf(path) as file:
            for name in file.tensors:
                file.raw(name)[..., :1].sum()
    except GGUFError as error:
        return None, refused(error, path, "container")
    try:
        return load(), ""
    except refusals as error:
        return None, refused(error, path, "load")
    except ValueError as error:                             # what only the kernels cannot do
        if backend == "kernels" and "reference" in str(error):
            return None, refused(error, path, "load")
        raise


def run_gguf(path: Path, backend: str = "reference") -> str:
    """Opens, loads, encodes, decodes and computes; says how far it came. Raises anything but what is promised."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found, how = loaded(path, backend, lambda: refimpl.load(path, backend=backend), (GGUFError, TokenizerError))
        if found is None:
            return how
        ids = found.tokenizer.encode("the hat\n\U0001f642 <bos><|x|><td>", special=True)
        found.tokenizer.decode(ids)
        ids = [i for i in ids if i < found.config.n_vocab][:min(3, found.config.n_ctx)]
        if not ids:
            return "loaded"
        logits = found.logits(ids)
        assert logits.shape == (len(ids), found.config.n_vocab) and logits.dtype == np.float32
        return "logits"


def run_projector(path: Path, backend: str = "reference") -> str:
    """The same for a projector: a picture of one soft token and a short sound."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found, how = loaded(path, backend, lambda: refimpl.load_projector(path, backend=backend, cache_disk=0), GGUFError)
        if found is None:
            return how
        if found.sees:
            side, n = found.squares
            y, x = np.divmod(np.arange(n * n), n)
            squares = np.random.default_rng(0).random((n * n, 3 * side * side), np.float32)
            if n <= found.config.vision.n_positions:
                assert found.image_tokens(squares, np.stack([x, y], axis=-1)).shape == (1, found.n_embd)
        if found.hears:
            width = found.config.audio.n_samples if found.encoder_free else found.config.audio.n_mel
            frames = np.random.default_rng(0).random((9, width), np.float32)
            assert found.audio_tokens(frames).shape == (9 if found.encoder_free else 3, found.n_embd)
        return "tokens"


def run_directory(path: Path, target) -> str:
    """The same for a drafter's directory."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.tensors:
                checkpoint.raw(name)[..., :1].sum()
        except GGUFError as error:
            return refused(error, path, "container")
        try:
            drafter = refimpl.load_drafter(path, target)
        except GGUFError as error:
            return refused(error, path, "load")
        assert len(refimpl.propose(target, drafter, [2, 5, 6], 2)) == 2
        return "logits"


def refused(error: Exception, path: Path, where: str) -> str:
    """An error is one line, not a page, and names the file."""
    line = str(error)
    assert "\n" not in line and len(line) <= MAX_MESSAGE + len(str(path)) and str(path) in line, line[:2000]
    return where


def read_everything(path: Path) -> str:
    """The container alone: every value, every tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_gguf(path) as file:
                for value in file.metadata.values():
                    if not isinstance(value, (str, int, float, np.ndarray)):
                        value.tolist()
                for name in file.tensors:
                    file.raw(name).sum()
        except GGUFError as error:
            return refused(error, path, "container")
    return "read"


def read_checkpoint(path: Path) -> str:
    """A directory's files alone."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.raw(name).sum()
    except GGUFError as error:
        return refused(error, path, "container")
    return "read"


WORDS = ("{{", "}}", "{%", "%}", "{#", "#}", "messages", "[0]", ".content", ".role", "|", "for m in messages", "endfor", "if", "else",
         "endif", "set x =", "macro f(a)", "endmacro", "f(1)", "x", "loop.index", "'a'", "\"%s\"", "1", "7", "~", "+", "*", "%", "==",
         "in", "not", "is", "defined", "none", "range(9)", "namespace(a=1)", "dict(a=1)", "tojson", "list", "join",
         "map(attribute='content')", "attr('__class__')", "__class__", "__globals__", ".mro", "cycler", "joiner", "lipsum", "self",
         "caller()", "call", "endcall", "filter upper", "endfilter", "raw", "endraw", "generation", "endgeneration",
         "raise_exception('x')", "strftime_now('%Y')", "break", "continue", "include 'a'", "import 'a' as b", "extends 'a'", "block b",
         "endblock", "format(1)", "batch(2)", "slice(2)", "groupby('role')", "random", "center(9)", "indent", "xmlattr", "(", ")", "[",
         "]", "{", "}", ",", ":", "-", "\n", "trans", "debug", "recursive", "loop(messages)", "|safe", ".__init__",
         "|map('attr', '__class__')")


ATOMS = ("messages", "messages[0]", "'a%s'", "1", "7", "none", "x", "range(9)", "namespace(a=1)", "dict(a=1)", "cycler", "joiner", "lipsum",
         "loop", "bos_token", "[1, 'b']", "{'k': 'v'}", "self", "f", "raise_exception", "strftime_now")
FILTERS = ("length", "tojson", "list", "first", "join(',')", "upper", "string", "int", "map(attribute='content')", "attr('__class__')",
           "format(1)", "batch(2)", "center(9)", "indent", "items", "sort", "unique", "reverse", "map('attr', '__class__')",
           "xmlattr", "random", "safe")
NAMES_OF_JINJA = ("content", "role", "__class__", "__globals__", "__init__", "mro", "index", "format", "append", "update", "fromkeys",
                  "a", "k")
OPERATORS = ("+", "-", "*", "%", "~", "==", "<", "in", "and", "or", "is")


def make_template(data: bytes) -> str:
    """Well-formed blocks, or words of Jinja in any order."""
    stream = Stream(data)
    if stream.number(4) == 3:
        return " ".join(stream.pick(WORDS) for _ in range(min(len(data), 60)))
    return "".join(block(stream, 3) for _ in range(1 + stream.number(5)))


def block(stream, depth: int) -> str:
    what, inside = stream.number(7 if depth else 2), lambda: block(stream, depth - 1)
    if what == 1:
        return "text\n"
    if what == 2:
        return "{%% for x in %s %%}%s{%% endfor %%}" % (expression(stream, 2), inside())
    if what == 3:
        return "{%% if %s %%}%s{%% else %%}%s{%% endif %%}" % (expression(stream, 2), inside(), inside())
    if what == 4:
        return "{%% set x = %s %%}%s" % (expression(stream, 2), inside())
    if what == 5:
        return "{%% macro f(x) %%}%s{%% endmacro %%}%s" % (inside(), inside())
    if what == 6:
        return "{%% generation %%}%s{%% endgeneration %%}" % inside()
    return "{{ %s }}" % expression(stream, 3)


def expression(stream, depth: int) -> str:
    what = stream.number(6 if depth else 1)
    if what == 0:
        return stream.pick(ATOMS)
    part = expression(stream, depth - 1)
    if what == 1:
        return f"{part} | {stream.pick(FILTERS)}"
    if what == 2:
        return f"{part}.{stream.pick(NAMES_OF_JINJA)}"
    if what == 3:
        return f"({part}) {stream.pick(OPERATORS)} ({expression(stream, depth - 1)})"
    return f"{part}({stream.pick(ATOMS)})" if what == 4 else f"{part}[{stream.pick(ATOMS)}]"


def run_template(template: str) -> str:
    """Renders in this process; whatever the template does, it is text or an error of one line."""
    from refimpl.text import chat

    request = {"template": template, "variables": {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "tools": None, "documents": None,
        "add_generation_prompt": True, "enable_thinking": False, "bos_token": "<bos>", "eos_token": "<eos>"}}
    reply = chat._reply(json.dumps(request))
    assert len(reply) == 1 and "\n" not in reply.get("error", "") and isinstance(next(iter(reply.values())), str), reply
    return next(iter(reply))


def traced_peak(call) -> tuple[object, int]:
    """(what `call` returns, the most bytes that Python and NumPy held meanwhile)."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


assert set(NUMBER_OF) <= set(BLOCKS)
