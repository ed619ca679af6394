"""From a Hugging Face directory, or a GGUF file, to a GGUF file with other types.

Types, by `--type`:
    auto      nothing is rounded: bfloat16 becomes BF16, float16 F16, float32 F32, W4A16 Q4_0 with its codes and scales
    F32, F16, BF16, Q8_0    every matrix
    others    every matrix but the embeddings (token_embd, per_layer_token_embd, output), which become Q6_K as in Google's files
Always: vectors (norms, scales) and the router are F32; per_layer_model_proj is never quantized; a row that is not a whole number of blocks
falls back as in llama.cpp (Q4_K to Q5_0, Q6_K to Q8_0, others to F16). Q4_0 recovers the scales of quantization-aware training
(files/recover_scales.py).

Projectors (mmproj): vectors, position tables, convolutions and a.input_projection are F32; v.patch_embd is F32, or F16 in F16 files; `auto`
keeps the other types.

What differs from llama.cpp's converter (convert_hf_to_gguf.py of llama-cpp-python 0.3.36), tensors and keys being equal otherwise
(tests/test_convert.py):
    general.*            name is the folder's, as it is. No size_label, basename, finetune, version, licence, tags: it guesses them from the
                         folder's name, and takes them from README.md
    feed_forward_length, attention.head_count_kv    one number where all layers have the same; it writes an array for some models
    tokenizer.ggml.token_type    tokens that tokenizer.json calls special are control tokens even where tokenizer_config.json does not
                         name them; it takes those for text
    tokenizer.ggml.eot_token_id, eom_token_id       from generation_config.json's eos_token_id, for tokens that no reader knows by name
    tokenizer.ggml.suppress_tokens                  for every model with them; it reads them for gemma4_unified only
    tokenizer.chat_template    chat_template.jinja takes precedence over the one in tokenizer_config.json, as in transformers
    config.json with both forms of the full layers' sizes (loading/config_json.py)      per_layer_config counts, as in transformers
    drafters             masked_embd_centroids, masked_embd_ordering and the key masked_embd_top_k are kept; other engines ignore them
    experts stored one by one    are stacked; it does not know this form
    projectors           clip.*.attention.layer_norm_epsilon is config.json's rms_norm_eps; image_mean and image_std are 0 and 1, as in all
                         published preprocessor_config.json, which it reads
    types                it writes F32, F16, BF16 and Q8_0; float32 matrices become F16 by its `auto`
"""

import errno
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl.files.recover_scales import quantize_q4_0_on_grid
from refimpl.formats.checkpoint import CheckpointError
from refimpl.formats.gguf import GGUFError, TensorInfo
from refimpl.formats.gguf_writer import PLAIN_TYPES, Deferred, write_gguf
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import DEQUANTIZABLE, QUANTIZABLE, dequantize, quantize
from refimpl.formats.source import TensorSource, releasing
from refimpl.loading.hf_names import fitting_type, stays_float32
from refimpl.loading.open import open_model
from refimpl.loading.towers import names as towers
from refimpl.loading.towers.directory import open_projector
from refimpl.model.config import PROJECTOR_ARCHITECTURE, architecture_of
from refimpl.model.towers.config import projector_config_from_gguf
from refimpl.progress import Advance, Progress, silent

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
FLOATS = ("F32", "F16", "BF16")
WHOLE = (*FLOATS, "Q8_0")                       # types that embeddings take too
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32}
CHUNK = 1 << 22                                 # weights converted at a time


def output_types() -> list[str]:
    """What `output_type` may be."""
    return ["auto", *sorted(QUANTIZABLE)]


def convert(path: str | os.PathLike, output: str | os.PathLike, output_type: str = "auto",
            progress: Progress = silent, projector: bool = False) -> dict[str, object]:
    """Writes the model or drafter at `path` to the GGUF file `output`; `output_type` is one of `output_types()`. Returns what was written.

    `projector`: writes instead the part of a model's directory that sees and hears. A GGUF file of such a part is known as one.

    Converts one tensor at a time, so that memory holds only the largest of them. The file appears under its name when it is complete, and
    not at all if anything fails.

    Raises GGUFError for what cannot be read, ValueError for an unknown `output_type` or an unusable output, OSError when writing fails.
    """
    if output_type not in output_types():
        raise ValueError(f"unknown type {output_type!r}; choose from {', '.join(output_types())}")
    file, output = (open_projector if projector else open_model)(path), Path(output)
    _check_output(file, output)
    projector = projector or architecture_of(file.metadata) == PROJECTOR_ARCHITECTURE
    if projector:
        projector_config_from_gguf(file)
    elif file.path.is_dir() and "tokenizer.ggml.tokens" not in file.metadata:
        raise CheckpointError(file.path, None, "tokenizer.json is missing, and no engine loads a file without it: copy it and "
                              "tokenizer_config.json from the drafter's model")
    rule = towers.type_in_projector if projector else type_of
    types = {name: rule(output_type, info) for name, info in file.tensors.items()}
    for name, info in file.tensors.items():
        if types[name] != info.type and info.type not in DEQUANTIZABLE and info.type != "I64":
            raise GGUFError(file.path, info.offset, f"tensor {name} is {info.type}, which this version cannot convert")
    n_bytes = sum(math.prod(info.shape[:-1]) * BLOCKS[types[name]].row_bytes(info.shape[-1]) for name, info in file.tensors.items())
    free = shutil.disk_usage(output.absolute().parent).free if output.absolute().parent.is_dir() else n_bytes
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"{n_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free", os.fspath(output))
    with progress("MB converted", file.n_bytes, 10**6) as advance:
        advance = releasing(file, advance)
        write_gguf(output, metadata_for(file, types, output_type),
                   [_deferred(file, info, types[name], advance) for name, info in file.tensors.items()])
    return {"output": str(output), "bytes": output.stat().st_size, "tensors": len(types), "types": dict(Counter(types.values())),
            "converted": sum(types[name] != info.type for name, info in file.tensors.items())}


def type_of(output_type: str, info: TensorInfo) -> str:
    """The type of a tensor in the output."""
    if info.type in ("I32", "I64"):
        return "I32"
    if stays_float32(info.name, info.shape):
        return "F32"
    if output_type == "auto" or info.name == "per_layer_model_proj.weight" and output_type not in FLOATS:
        return info.type
    return fitting_type("Q6_K" if info.name in EMBEDDINGS and output_type not in WHOLE else output_type, info.shape[-1])


def metadata_for(file: TensorSource, types: Mapping[str, str], output_type: str) -> dict[str, object]:
    """The keys of the output: those of the input, with what has changed."""
    projector = architecture_of(file.metadata) == PROJECTOR_ARCHITECTURE
    whole = towers.stays_float32 if projector else stays_float32
    matrices = [block for name, block in types.items() if name not in EMBEDDINGS and not whole(name, file.tensors[name].shape)]
    changed = {"general.type": "mmproj" if projector else "model", "general.quantization_version": 2}
    common = Counter(matrices).most_common(1)[0][0]
    common = output_type if projector and output_type != "auto" else common             # the 12B's has two matrices that differ
    if common in FILE_TYPES:
        changed["general.file_type"] = FILE_TYPES[common]
    kept = {key: value for key, value in file.metadata.items() if not key.startswith("split.") and key != "general.file_type"
            and not (hasattr(value, "__len__") and not isinstance(value, str) and not len(value))}
    if "general.sampling.top_k" in kept:
        kept["general.sampling.top_k"] = np.int32(kept["general.sampling.top_k"])       # as the converter has it
    return kept | changed


def _check_output(file: TensorSource, output: Path):
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; give the name of a file")
    if output.exists() and any(os.path.samefile(output, part) for part in file.files()):
        raise ValueError(f"{output}: is the input itself; give another name")


def _deferred(file: TensorSource, info: TensorInfo, block: str, advance: Advance) -> tuple[str, str, Deferred]:
    """A tensor for write_gguf, read and converted when it is written."""
    def make() -> np.ndarray:
        raw = file.raw(info.name)
        if block == info.type:
            advance(info.n_bytes)
            return raw.view(PLAIN_TYPES.get(block, "uint8")).reshape(shape)
        if block == "I32":
            advance(info.n_bytes)
            return raw.view("<i8").astype(np.int32).reshape(shape)
        rows = raw.reshape(-1, raw.shape[-1])
        out = np.empty((len(rows), BLOCKS[block].row_bytes(info.shape[-1])), np.uint8)
        n_rows = max(1, CHUNK // info.shape[-1])
        for first in range(0, len(rows), n_rows):
            part = rows[first:first + n_rows]
            x = dequantize(part, info.type)
            out[first:first + n_rows] = quantize_q4_0_on_grid(x) if block == "Q4_0" else quantize(x, block)
            advance(part.nbytes)
        return out.view(PLAIN_TYPES.get(block, "uint8")).reshape(shape)

    dtype = np.dtype(PLAIN_TYPES.get(block, "uint8"))
    shape = info.shape if block in PLAIN_TYPES else (*info.shape[:-1], BLOCKS[block].row_bytes(info.shape[-1]))
    return info.name, block, Deferred(shape, dtype, make)
