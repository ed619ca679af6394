"""Writes a trained model as the GGUF file that ships: `python -m refimpl.tiny.training.export tiny-run -o model.gguf`.

With `--drafter` a trained drafter: `python -m refimpl.tiny.training.export drafter-run --drafter -o drafter.gguf`.
With `--projector` a trained projector: `python -m refimpl.tiny.training.export projector-run --projector -o mmproj.gguf`; its
matrices are Q8_0, the one for patches is F16.

All matrices of the others but the router's are Q4_0. The unrounded weights are quantized once, here, by the rule that the training
rounded them with, so the file holds exactly the weights that the last steps computed with.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np

from refimpl.formats.gguf_writer import write_gguf
from refimpl.formats.quants.codecs import quantize
from refimpl.loading.hf_names import drafter_metadata, gguf_metadata, gguf_tensors
from refimpl.loading.towers import names
from refimpl.loading.towers.settings import projector_metadata
from refimpl.text.templates import CONTINUATION_TEMPLATE
from refimpl.tiny import corpus
from refimpl.tiny.training import vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MODEL_NAMES = {     # attention_k_eq_v -> what the file calls itself, and of what
    True: ("refimpl tiny python", "A Gemma 4 MoE"), False: ("refimpl tiny python e2b", "A Gemma 4 E2B")}
VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')


def tokenizer_metadata(tokenizer_json: str) -> dict[str, object]:
    """The `tokenizer.ggml.*` keys of a vocabulary trained by `vocabulary.py`, typed as llama.cpp's converter does."""
    model = json.loads(tokenizer_json)["model"]
    tokens = [vocabulary.SOFT_MARKERS.get(token, token) for token in sorted(model["vocab"], key=model["vocab"].get)]
    special = {*vocabulary.CONTROL, *vocabulary.MARKERS, *vocabulary.SOFT_MARKERS.values()}
    types = [UNKNOWN if p == "<unk>" else USER_DEFINED if p in VISIBLE else CONTROL if p in special
             else BYTE if p.startswith("<0x") and len(p) == 6 else NORMAL for p in tokens]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.full(len(tokens), -1000.0, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": vocabulary.BOS,
        "tokenizer.ggml.eos_token_id": vocabulary.EOS,
        "tokenizer.ggml.unknown_token_id": vocabulary.UNK,
        "tokenizer.ggml.padding_token_id": vocabulary.PAD,
        "tokenizer.ggml.mask_token_id": vocabulary.MASK,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def about_file(name: str, description: str, more_sources: str = "") -> dict[str, object]:
    """The `general.*` keys of the files that ship."""
    return {"general.name": name, "general.description": description, "general.license": "MIT",
            "general.source.description": f"Python {platform.python_version()} standard library, {corpus.LICENCE}{more_sources}",
            "general.file_type": 2,                    # mostly Q4_0
            "general.quantization_version": 2}


def export(run: Path, target: Path):
    """Writes the model of a training run (its `model.pt`, `config.json` and `tokenizer.json`) to `target`."""
    import torch

    state = {name: value.numpy() for name, value in torch.load(run / "model.pt", weights_only=True).items()}
    config = json.loads((run / "config.json").read_text())
    name, kind = MODEL_NAMES[config["attention_k_eq_v"]]
    about = about_file(name, f"{kind} in miniature, trained on the Python standard library's source. Writes Python-like text.") | {
        # no top-k or top-p: without the tail a model of this size gets into loops (8 of 48 texts; none with it)
        "general.sampling.temp": 0.7, "general.sampling.top_k": 0, "general.sampling.top_p": 1.0,
    }
    metadata = gguf_metadata(config) | about | tokenizer_metadata((run / "tokenizer.json").read_text()) | {
        "tokenizer.chat_template": CONTINUATION_TEMPLATE}
    write_gguf(target, metadata, gguf_tensors(config, state, lambda name, shape: "Q4_0"))


def export_drafter(run: Path, target: Path):
    """Writes the drafter of a training run (its `drafter.pt` and `config.json`) to `target`, with the built-in models' vocabulary."""
    import torch

    from refimpl.formats.gguf import open_gguf
    from refimpl.loading.model import BUILT_IN

    state = {name: value.numpy() for name, value in torch.load(run / "drafter.pt", weights_only=True).items()}
    config = json.loads((run / "config.json").read_text())
    of, _ = MODEL_NAMES[config["text_config"]["attention_k_eq_v"]]
    about = about_file(f"{of} drafter", f"Drafts for the {of} model (multi-token prediction).", ", and texts of the target")
    vocabulary_keys = {key: value for key, value in open_gguf(BUILT_IN).metadata.items() if key.startswith("tokenizer.ggml.")}
    write_gguf(target, drafter_metadata(config) | about | vocabulary_keys,
               gguf_tensors(config["text_config"], state, lambda name, shape: "Q4_0"))


def export_projector(run: Path, target: Path):
    """Writes the projector of a training run (its `projector.pt`) to `target`, under the names of llama.cpp's files."""
    import torch

    from refimpl.tiny.training.network import SHAPE
    from refimpl.tiny.training.train_projector import VISION

    config = {"model_type": "gemma4", "vision_config": VISION,
              "text_config": {"hidden_size": SHAPE["hidden_size"], "use_bidirectional_attention": "vision"}}
    about = about_file("refimpl tiny python projector", "Reads pictures of 48 words for the refimpl tiny python model.")
    tensors = []
    for theirs, value in torch.load(run / "projector.pt", weights_only=True).items():
        name, change = names.gguf_name(theirs), names.ADAPT.get(theirs, np.ascontiguousarray)
        array = np.ascontiguousarray(change(value.float().numpy()))
        if name == "v.patch_embd.weight":
            tensors.append((name, "F16", array.astype(np.float16)))
        elif names.stays_float32(name, array.shape):
            tensors.append((name, "F32", array))
        else:
            tensors.append((name, "Q8_0", quantize(array, "Q8_0")))
    del about["general.source.description"]
    write_gguf(target, projector_metadata(config, run) | about | {"general.file_type": 7}, tensors)


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.training.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished `python -m refimpl.tiny.training.train`")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.gguf"))
    parser.add_argument("--drafter", action="store_true", help="the folder is one of `python -m refimpl.tiny.training.train_drafter`")
    parser.add_argument("--projector", action="store_true", help="the folder is one of `python -m refimpl.tiny.training.train_projector`")
    args = parser.parse_args(argv)
    (export_projector if args.projector else export_drafter if args.drafter else export)(args.run, args.output)


if __name__ == "__main__":
    main()
