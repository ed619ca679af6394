"""How the .gguf files in this folder were made, by llama.cpp's own programs from models of transformers' own classes.

    python tests/files/make.py CONVERTER

CONVERTER is convert_hf_to_gguf.py of the llama.cpp inside the llama-cpp-python 0.3.36 source package. llama-quantize is called through that
package's library (llama_model_quantize). Needs torch 2.13.0, transformers 5.22.2, llama-cpp-python 0.3.36.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

N_VOCAB = 512
OVERRIDES = dict(vocab_size=N_VOCAB, vocab_size_per_layer_input=N_VOCAB)
MODELS = {
    # name of the file: (shape, what differs from tests/shapes.py, types that llama-quantize made of it)
    "moe": ("26B-A4B", dict(num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"], num_experts=8,
                            hidden_size=256, intermediate_size=256, head_dim=16, global_head_dim=32), ["Q4_0", "Q4_K_M"]),
    "ple": ("E2B", {}, ["Q8_0"]),
}
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}      # enum llama_ftype


def text_config(name: str):
    """The configuration of a fixture's model."""
    from shapes import COMMON, SHAPES
    from transformers import Gemma4TextConfig

    shape, overrides, _ = MODELS[name]
    return Gemma4TextConfig(**COMMON | SHAPES[shape] | OVERRIDES | overrides)


def save_model(name: str, folder: Path):
    """A random model with a trained vocabulary, as a Hugging Face directory."""
    from shapes import random_model
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from refimpl.tiny.corpus import read_corpus
    from refimpl.tiny.training.vocabulary import MARKERS, train_vocabulary

    tokenizer_file = HERE / "tokenizer.json"
    if not tokenizer_file.exists():
        train_vocabulary(list(read_corpus().library.values())[:80], N_VOCAB).save(str(tokenizer_file))
    shape, overrides, _ = MODELS[name]
    model = random_model(shape, seed=7, **OVERRIDES | overrides)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(tokenizer_file)), bos_token="<bos>", eos_token="<eos>",
                                        unk_token="<unk>", pad_token="<pad>", mask_token="<mask>", extra_special_tokens=list(MARKERS))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) |
                                                   {"architectures": ["Gemma4ForCausalLM"]}))


def main(converter: str):
    """Makes every file."""
    import llama_cpp

    for name, (_, _, types) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            save_model(name, Path(folder) / "hf")
            whole = Path(folder) / "f32.gguf"
            subprocess.run([sys.executable, converter, f"{folder}/hf", "--outfile", str(whole), "--outtype", "f32"], check=True)
            subprocess.run([sys.executable, converter, f"{folder}/hf", "--outfile", str(HERE / f"{name}-bf16.gguf"), "--outtype", "bf16"],
                           check=True)
            for block in types:
                options = llama_cpp.llama_model_quantize_default_params()
                options.ftype, options.nthread = FILE_TYPES[block], 1
                target = HERE / f"{name}-{block.lower()}.gguf"
                if llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), options):
                    raise SystemExit(f"llama-quantize failed on {target}")


if __name__ == "__main__":
    main(sys.argv[1])
