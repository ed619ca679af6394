"""Files written by llama.cpp's own converter and quantizer (tests/files/make.py) load, and match transformers on the same weights.

The weights reach transformers through the gguf package's reader and decoder, not through ours.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from shapes import oracle, prompt, reference, worst
from tokenizers import Tokenizer
from transformers import Gemma4ForCausalLM

from refimpl.loading.hf_names import gguf_name

FILES = Path(__file__).parent / "files"
sys.path.insert(0, str(FILES))
from make import MODELS, text_config  # noqa: E402

CASES = [(name, block) for name, (_, _, types) in MODELS.items() for block in ["bf16", *map(str.lower, types)]]


def from_file(name: str, path: Path) -> Gemma4ForCausalLM:
    """transformers' model with the weights of a GGUF file."""
    config = text_config(name)
    config._attn_implementation = config._experts_implementation = "eager"
    model = Gemma4ForCausalLM(config).eval().float()
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in gguf.GGUFReader(path).tensors}
    used = {"rope_freqs.weight"}
    with torch.no_grad():
        for hf_name, value in model.state_dict().items():
            if hf_name != "lm_head.weight":
                value.copy_(torch.from_numpy(np.array(tensors[gguf_name(hf_name)], np.float32)))
                used.add(gguf_name(hf_name))
    assert used == set(tensors)
    return model


@pytest.mark.parametrize("name,block", CASES)
def test_logits_and_layers(name, block):
    path = FILES / f"{name}-{block}.gguf"
    model, got = reference(path, weights="quantized"), {}
    ids = [i % 512 for i in prompt(40)]
    model.logits(ids, tap=got.__setitem__)
    for tensor, want in oracle(from_file(name, path), ids).items():
        assert worst(got[tensor], want) < 1e-4, f"{tensor}: {worst(got[tensor], want):.1e}"


def test_the_types_are_the_ones_seen_in_the_wild():
    """K-quants fall back where a row is no multiple of 256, embeddings get Q6_K."""
    used = {name: {info.type for info in reference(FILES / f"{name}.gguf").file.tensors.values()}
            for name in ("moe-q4_0", "moe-q4_k_m", "ple-q8_0", "moe-bf16")}
    assert {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F32"} <= used["moe-q4_k_m"], used
    assert {"Q4_0", "Q6_K"} <= used["moe-q4_0"] and "Q8_0" in used["ple-q8_0"] and "BF16" in used["moe-bf16"], used


def test_vocabulary_as_the_converter_writes_it():
    hf = Tokenizer.from_file(str(FILES / "tokenizer.json"))
    ours = reference(FILES / "moe-bf16.gguf").tokenizer
    for text in ("def main(self):\n    return 1\n\n\n", "  x = {'a': [1, 2]}  # né 中 \U0001f642\t", "", "<bos> <|turn>"):
        hf.encode_special_tokens = True
        assert ours.encode(text, bos=False) == hf.encode(text, add_special_tokens=False).ids
        hf.encode_special_tokens = False
        assert ours.encode(text, bos=False, special=True) == hf.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
