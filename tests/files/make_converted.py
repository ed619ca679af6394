"""How converted.json was made: what llama.cpp's converter writes of small Hugging Face directories, tensor by tensor and key by key.

    python tests/files/make_converted.py CONVERTER

CONVERTER is convert_hf_to_gguf.py of the llama.cpp inside the llama-cpp-python 0.3.36 source package. Needs torch 2.13.0, transformers
5.22.2, compressed-tensors, gguf 0.19, sentencepiece. The weights are made of integers by NumPy's generator, so that every machine makes the
same directories.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
LISTING = HERE / "converted.json"
LONG = 64           # values longer than this are kept as a hash
CASES = {           # name: types that the converter was asked for, and those that refimpl is asked for
    "dense": ("bf16", "auto"), "dense-q8_0": ("q8_0", "Q8_0"), "dense-f16": ("f16", "F16"), "per-layer": ("bf16", "auto"),
    "moe-multimodal": ("bf16", "auto"), "unified": ("bf16", "auto"), "w4a16": ("f32", "F32"), "drafter": ("bf16", "auto"),
}


def from_integers(model, seed: int):
    """Gives every weight a value that bfloat16 and float16 hold exactly."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        weights = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("layer_scalar"))]
        for _, p in sorted(weights):
            values = rng.integers(-120, 121, p.shape) if p.ndim > 1 else rng.integers(60, 121, p.shape)
            p.copy_(torch.from_numpy((values / 512).astype(np.float32)))
    return model


def make_directory(case: str, folder: Path) -> Path:
    """Writes the directory of a case."""
    import torch
    from directories import change_json, multimodal, save, save_w4a16, write_vocabulary
    from shapes import random_drafter, random_model

    name, folder = case.removesuffix("-q8_0").removesuffix("-f16"), folder / "tiny"
    if name == "drafter":
        from_integers(random_drafter("E4B", n_centroid=20), 5).to(torch.bfloat16).save_pretrained(folder)
        write_vocabulary(folder)
        change_json(folder / "config.json", architectures=["Gemma4AssistantForCausalLM"])
    elif name == "w4a16":
        save_w4a16(folder, from_integers(random_model("12B"), 4))
    elif name in ("moe-multimodal", "unified"):
        model, _ = multimodal("12B" if name == "unified" else "26B-A4B", name == "unified")
        save(folder, from_integers(model, 3), torch.bfloat16, "100KB", old_form=name != "unified")
        config = json.loads((folder / "config.json").read_text())
        config["text_config"].setdefault("moe_intermediate_size", None)         # the converter wants the key, transformers leaves it out
        (folder / "config.json").write_text(json.dumps(config))
    else:
        save(folder, from_integers(random_model("E2B" if name == "per-layer" else "31B"), 2), torch.bfloat16)
    change_json(folder / "generation_config.json", top_k=64, top_p=0.95, temperature=1.0, eos_token_id=[1],
                **{"suppress_tokens": [7, 8]} if name == "unified" else {})
    if name == "dense":
        (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    else:
        change_json(folder / "tokenizer_config.json", chat_template="{{ bos_token }}{{ messages[0].content }}")
    return folder


def digest(data: bytes) -> str:
    """A hash that is short enough to list."""
    return hashlib.sha256(data).hexdigest()[:32]


def listing(path: Path) -> dict[str, object]:
    """What is in a GGUF file, by the gguf package: tensors with type, shape and hash; keys with type and value."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {t.name: [t.tensor_type.name, t.shape[::-1].tolist(), digest(t.data.tobytes())] for t in reader.tensors}
    keys = {}
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        value = field.contents()
        text = json.dumps(value)
        keys[key] = ["/".join(kind.name for kind in field.types), value if len(text) <= LONG else digest(text.encode())]
    return {"tensors": tensors, "keys": keys}


def main(converter: str):
    """Makes the listing."""
    found = {}
    for case, (kind, _) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            source, target = make_directory(case, Path(folder)), Path(folder) / "out.gguf"
            subprocess.run([sys.executable, converter, str(source), "--outfile", str(target), "--outtype", kind], check=True)
            found[case] = listing(target)
    lines = [f'"{case}": {{"keys": {json.dumps(found[case]["keys"])},\n"tensors": {{\n'
             + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found[case]["tensors"].items()) + "}}"
             for case in found]
    LISTING.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1])
