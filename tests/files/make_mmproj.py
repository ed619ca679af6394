"""How mmproj.json was made: what llama.cpp's converter writes of the parts that see and hear, tensor by tensor and key by key.

    python tests/files/make_mmproj.py CONVERTER

As make_converted.py, with the same packages; the values of the scale that the converter computes are listed as numbers.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from make_converted import HERE, listing

LISTING = HERE / "mmproj.json"
CASES = {           # name: kind of towers, type of the directory, type that the converter was asked for, type that refimpl is asked for
    "small": ("small", "bfloat16", "bf16", "auto"), "small-q8_0": ("small", "bfloat16", "q8_0", "Q8_0"),
    "small-f16": ("small", "float32", "f16", "F16"), "small-f32": ("small", "float32", "f32", "F32"),
    "large": ("large", "bfloat16", "bf16", "BF16"), "large-q8_0": ("large", "bfloat16", "q8_0", "Q8_0"),
    "unified": ("unified", "bfloat16", "bf16", "auto"), "unified-f16": ("unified", "bfloat16", "f16", "F16"),
    "unified-q8_0": ("unified", "bfloat16", "q8_0", "Q8_0"),
}
COMPUTED = "per_dim_scale.weight"


def make_directory(case: str, folder: Path) -> Path:
    """Writes the directory of a case: every number one that bfloat16 and float16 hold exactly."""
    import torch
    from directories import change_json
    from tower_models import random_towers, save_towers

    kind, dtype, *_ = CASES[case]
    model, rng, folder = random_towers(kind), np.random.default_rng(9), folder / "tiny"
    with torch.no_grad():
        for _, p in sorted([*model.named_parameters(), *model.named_buffers()]):
            if p.is_floating_point():
                p.copy_(torch.from_numpy(np.asarray(rng.integers(-120, 121, p.shape) / 64, np.float32)))
    save_towers(folder, model, getattr(torch, dtype))
    change_json(folder / "preprocessor_config.json", image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0])
    return folder


def with_numbers(found: dict, path: Path) -> dict:
    """`found`, a listing of the file, with the numbers of computed tensors in place of their hashes."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.endswith(COMPUTED):
            found["tensors"][tensor.name][2] = tensor.data.tolist()
    return found


def main(converter: str):
    """Makes the listing."""
    found = {}
    for case, (_, _, kind, _) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            source, target = make_directory(case, Path(folder)), Path(folder) / "out.gguf"
            command = [sys.executable, converter, str(source), "--mmproj", "--outfile", str(target), "--outtype", kind]
            subprocess.run(command, check=True)
            found[case] = with_numbers(listing(target), target)
    lines = [f'"{case}": {{"keys": {json.dumps(found[case]["keys"])},\n"tensors": {{\n'
             + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found[case]["tensors"].items()) + "}}"
             for case in found]
    LISTING.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1])
