"""A block of weights taken apart, from the very file: its bytes, its fields, its weights."""

import math

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, fields_of
from refimpl.formats.quants.codecs import DEQUANTIZABLE, dequantize
from refimpl.lab.glass.anatomy import explained
from refimpl.loading.model import Model


def tensors(model: Model) -> list[dict[str, object]]:
    """The tensors that can be taken apart: name, type, rows and blocks in a row. Plain numbers have no blocks."""
    return [{"name": name, "type": info.type, "rows": math.prod(info.shape[:-1]), "blocks": info.shape[-1] // BLOCKS[info.type].elements}
            for name, info in model.file.tensors.items() if BLOCKS[info.type].elements > 1 and info.type in DEQUANTIZABLE]


def taken_apart(model: Model, name: str, row: int, block: int) -> dict[str, object]:
    """One block: `bytes`; `fields` with their name, first byte, length and values; `weights`; and what `explained` says of it.

    Raises ValueError for a tensor, row or block that is not there.
    """
    found = {tensor["name"]: tensor for tensor in tensors(model)}.get(name)
    if found is None:
        raise ValueError(f"tensor: {name!r:.80} is no tensor of blocks in {model.file.path.name}")
    for what, value, end in (("row", row, found["rows"]), ("block", block, found["blocks"])):
        if not 0 <= value < end:
            raise ValueError(f"{what}: {value} is not there; {name} has {what}s 0 to {end - 1}")
    kind = BLOCKS[found["type"]]
    raw_OY = model.file.raw(name)
    raw = np.array(raw_OY.reshape(-1, raw_OY.shape[-1])[row, block * kind.n_bytes:(block + 1) * kind.n_bytes])
    record, fields, first = fields_of(raw, kind)[0], [], 0
    for field, dtype, count in kind.fields:
        n_bytes = np.dtype(dtype).itemsize * count
        values = np.atleast_1d(record[field])
        fields.append({"name": field, "first": first, "n_bytes": n_bytes, "dtype": dtype.lstrip("<"),
                       "values": [float(f"{v:.7g}") for v in values.tolist()] if dtype[1] == "f" else values.tolist()})
        first += n_bytes
    weights = dequantize(raw[None], kind.name)[0]
    return {**found, "row": row, "block": block, "bytes": raw.tolist(), "fields": fields,
            "weights": [float(f"{w:.6g}") for w in weights.tolist()], **explained(kind.name, raw)}


def samples(model: Model, n: int = 24) -> list[dict[str, object]]:
    """Blocks for a page without a server: of every kind of tensor the middle one of the first layer that has it, `n` at most."""
    roles: dict[str, dict[str, object]] = {}
    for tensor in tensors(model):
        roles.setdefault(tensor["name"].split(".", 2)[-1] if tensor["name"].startswith("blk.") else tensor["name"], tensor)
    return [taken_apart(model, tensor["name"], tensor["rows"] // 2, tensor["blocks"] // 2) for tensor in list(roles.values())[:n]]
