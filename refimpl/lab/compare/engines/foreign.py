"""Tensors that any engine can write: `.npz` or `.safetensors` by a convention.

    ids           the token ids of the prompt, int (T,)
    arithmetic    how the engine rounds: "float32", "bfloat16", "float16", "q8" or "exact"; in safetensors, in the metadata
    positions     optional, int (R,): which positions the rows are, all of them where it is not there
    image0.NAME[-LAYER], audio0.NAME[-LAYER]
                  a value of a tower, (T, ...): rows are patches row by row, frames without padding, or soft tokens
    NAME[-LAYER]  a value, (R, ...), under a name that `refimpl trace --names` lists; an axis of 1 in front (a batch) is dropped, and
                  the axes after the first may be flattened. bfloat16 is stored as float32.

In the places of soft tokens `ids` has the id of the placeholder (258880 for an image, 258881 for a sound), or any negative number. The
first names to write for a picture are image0.patches, image0.inp, image0.layer_out-N and image0.projected; then inp_scaled, which has the
soft tokens in their places. Write image0.patches as (row, column, colour) and in 0 to 1, whatever the engine's own order is.

Any of the names may be missing. Arrays with other names are listed and not compared. From an engine in PyTorch, for example:

    import numpy as np
    import torch

    kept = {}


    def keep(name):
        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            kept[name] = out.detach().float().cpu().numpy()
        return hook


    def dump(model, ids, path):
        # `model(ids)` gives logits; `model.layers[i]` returns the residual stream, with `norm` and `q_proj` inside
        hooks = []
        for i, layer in enumerate(model.layers):
            hooks.append(layer.register_forward_hook(keep(f"l_out-{i}")))
            hooks.append(layer.norm.register_forward_hook(keep(f"attn_norm-{i}")))
            hooks.append(layer.q_proj.register_forward_hook(keep(f"Qcur-{i}")))
        with torch.no_grad():
            kept["result_output"] = model(torch.tensor([ids])).float().cpu().numpy()
        for hook in hooks:
            hook.remove()
        np.savez(path, ids=np.array(ids), arithmetic="bfloat16", **kept)

and then `refimpl trace -m model.gguf --ids 2,105,9731 -o right.safetensors` and `refimpl compare right.safetensors dump.npz`.
"""

import os
import zipfile
from collections.abc import Mapping

import numpy as np

from refimpl.formats.safetensors import TensorFile
from refimpl.lab.compare.trace import ARITHMETIC, Trace, TraceError


def open_npz(path: str | os.PathLike) -> Trace:
    """A `.npz` file. Raises TraceError, naming the file and what is wrong."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise TraceError(f"{path}: cannot be read as .npz, it may be cut short ({' '.join(str(error).split())})") from None
    word = arrays.pop("arithmetic", None)
    return by_convention(str(path), arrays, None if word is None else str(word))


def open_safetensors(path: str | os.PathLike) -> Trace:
    """A `.safetensors` file that is no trace of ours. Raises TraceError or CheckpointError."""
    file = TensorFile(path)
    return by_convention(str(path), {name: file.array(name) for name in file.tensors}, file.metadata.get("arithmetic"))


def by_convention(where: str, arrays: Mapping[str, np.ndarray], arithmetic: str | None) -> Trace:
    """The trace in arrays that follow the convention."""
    arrays = dict(arrays)
    ids = arrays.pop("ids", None)
    if ids is None or ids.dtype.kind not in "iu" or ids.ndim != 1 or not len(ids):
        raise TraceError(f"{where}: expected an array 'ids' with the prompt's token ids, int (T,)")
    if arithmetic not in ARITHMETIC:
        raise TraceError(f"{where}: expected 'arithmetic' to be one of {', '.join(ARITHMETIC)}, found {arithmetic!r}")
    positions = arrays.pop("positions", np.arange(len(ids)))
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or (positions < 0).any() or (positions >= len(ids)).any():
        raise TraceError(f"{where}: expected 'positions' to be int (R,), each from 0 to {len(ids) - 1}")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise TraceError(f"{where}: {name} is of type {array.dtype}, expected numbers; store bfloat16 as float32")
        of_tower = name.startswith(("image", "audio")) and "." in name
        if array.shape[:1] == (1,) and (array.ndim > 2 if of_tower else array.shape[1:2] == (len(positions),) != (1,)):
            arrays[name] = array[0]
        elif not array.ndim:
            raise TraceError(f"{where}: {name} is a single number, expected rows of positions")
    return Trace(where, tuple(map(int, ids)), tuple(map(int, positions)), arithmetic, arrays)
