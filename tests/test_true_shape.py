"""A file of the true 26B-A4B shape cut to two layers, with a vocabulary of 262,144 pieces, runs in the reference within 4 GB."""

import itertools
import json
import string
import subprocess
import sys

import numpy as np
from shapes import BYTES

from refimpl.formats.blocks import BLOCKS
from refimpl.formats.codecs import quantize
from refimpl.formats.writer import write_gguf

D, E, M, F, V = 2816, 128, 704, 2112, 262_144

CHILD = """
import json, re, sys, time
import refimpl

began = time.perf_counter()
model = refimpl.load(sys.argv[1])
loaded = time.perf_counter() - began
ids = model.tokenizer.encode("hello there")
out = refimpl.generate(model, ids, max_new_tokens=2)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"load_seconds": loaded, "seconds": time.perf_counter() - began, "peak_bytes": peak, "new": len(out.ids),
                  "weights": model.weights.head_VD.type}))
"""


def vocabulary():
    """Control pieces, bytes, then a, b, ..., aa, ab, ... with the merges that reach them."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, "\u2581"]
    words = itertools.chain.from_iterable(map("".join, itertools.product(string.ascii_lowercase, repeat=n)) for n in (1, 2, 3, 4))
    words = list(itertools.islice(words, V - len(pieces)))
    types = np.array([3, 3, 3, 2, 3] + [6] * 256 + [1] * (V - 261), np.int32)
    return {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": pieces + words, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores": np.zeros(V, np.float32), "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.merges": [f"{word[:-1]} {word[-1]}" for word in words if len(word) > 1]}


def tensors():
    """Q4_0 throughout but for the Q6_K embedding, as Google ships it; contents are a few random rows over and over."""
    rng = np.random.default_rng(0)

    def matrix(name, block, *shape):
        rows = quantize(rng.standard_normal((64, shape[-1])).astype(np.float32) * shape[-1] ** -0.5, block)
        row_bytes = shape[-1] // BLOCKS[block].elements * BLOCKS[block].n_bytes
        return name, block, np.resize(rows, (*shape[:-1], row_bytes))

    def vector(name, size):
        return name, "F32", rng.uniform(0.5, 1.5, size).astype(np.float32)

    yield matrix("token_embd.weight", "Q6_K", V, D)
    yield vector("output_norm.weight", D)
    yield "rope_freqs.weight", "F32", np.where(np.arange(256) < 64, 1, 1e30).astype(np.float32)
    for i, (heads, kv, width) in enumerate(((16, 8, 256), (16, 2, 512))):
        blk = f"blk.{i}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "pre_ffw_norm_2", "post_ffw_norm_1",
                     "post_ffw_norm_2"):
            yield vector(f"{blk}{name}.weight", D)
        yield vector(f"{blk}attn_q_norm.weight", width)
        yield vector(f"{blk}attn_k_norm.weight", width)
        yield vector(f"{blk}layer_output_scale.weight", 1)
        yield vector(f"{blk}ffn_gate_inp.scale", D)
        yield vector(f"{blk}ffn_down_exps.scale", E)
        yield f"{blk}ffn_gate_inp.weight", "F32", rng.standard_normal((E, D)).astype(np.float32)
        yield matrix(f"{blk}attn_q.weight", "Q4_0", heads * width, D)
        yield matrix(f"{blk}attn_k.weight", "Q4_0", kv * width, D)
        if i == 0:
            yield matrix(f"{blk}attn_v.weight", "Q4_0", kv * width, D)
        yield matrix(f"{blk}attn_output.weight", "Q4_0", D, heads * width)
        yield matrix(f"{blk}ffn_gate.weight", "Q4_0", F, D)
        yield matrix(f"{blk}ffn_up.weight", "Q4_0", F, D)
        yield matrix(f"{blk}ffn_down.weight", "Q4_0", D, F)
        yield matrix(f"{blk}ffn_gate_up_exps.weight", "Q4_0", E, 2 * M, D)
        yield matrix(f"{blk}ffn_down_exps.weight", "Q4_0", E, D, M)


METADATA = {"general.architecture": "gemma4"} | {f"gemma4.{key}": value for key, value in {
    "block_count": 2, "context_length": 262_144, "embedding_length": D, "feed_forward_length": F, "attention.head_count": 16,
    "attention.head_count_kv": np.array([8, 2], np.int32), "attention.key_length": 512, "attention.value_length": 512,
    "attention.key_length_swa": 256, "attention.value_length_swa": 256, "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.sliding_window": 1024, "attention.sliding_window_pattern": np.array([True, False]), "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "rope.dimension_count": 512,
    "rope.dimension_count_swa": 256, "final_logit_softcapping": 30.0, "expert_count": E, "expert_used_count": 8,
    "expert_feed_forward_length": M}.items()}


def test_two_layers_of_the_26b_run_within_4_gb(tmp_path):
    path = tmp_path / "26b.gguf"
    write_gguf(path, METADATA | vocabulary(), tensors())
    done = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(f"\n{path.stat().st_size / 1e9:.2f} GB file: {result}")
    assert result["new"] == 2 and result["weights"] == "Q6_K"
    assert result["peak_bytes"] < 4e9
