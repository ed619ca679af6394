"""Windows and their figures as Parquet files: one row a window, with lists of the figures of its tokens.

    document      name of the text                  ids           the window's tokens, int32
    first         index in ids of the first one that counts       token         those that count: ids[first:]
    nll, ...      the columns of COLUMNS, a value for each token that counts (top_id, top_logit: a list of values)
    seconds       what the window took              machine       what computed it, JSON

What holds for all rows is JSON in the schema's metadata, under `refimpl`. To read one, a token a row:

    pandas.read_parquet("run.parquet", columns=["document", "token", "nll"]).explode(["token", "nll"])
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refimpl.extras import require
from refimpl.lab.evaluate.windows import Window

KEY = b"refimpl"
KEPT = {"log_sum": "<f8", "top_id": "<i4", "top_logit": "<f4"}
COLUMNS = {"nll": "<f8", **KEPT, "base_nll": "<f8", "kl_low": "<f8", "kl_high": "<f8", "same_top": "|u1", "shared_top": "|u1"}
"""By column: minus the logarithm of the token's probability, in nats; the fields of `divergence.Kept`; and, of a comparison, the base's
nll, the two bounds of the divergence (equal where it is exact), whether the most probable token is the same, how many of the most probable
ones are."""


class Part(NamedTuple):
    """The figures of one window, by column (COLUMNS), and how they came about: seconds of the model itself, the machine as JSON."""

    columns: dict[str, np.ndarray]
    seconds: float
    machine: str


def write_parquet(path: Path, table, about: Mapping[str, object]):
    """A pyarrow table with its metadata. The file is complete or not there at all. OSError names it."""
    parquet = require("pyarrow.parquet", "scale")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            parquet.write_table(table.replace_schema_metadata({KEY: json.dumps(about)}), file, compression="zstd",
                                write_page_checksum=True)
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), os.fspath(path)) from e
    finally:
        temporary.unlink(missing_ok=True)


def write_windows(path: Path, about: Mapping[str, object], windows: Sequence[Window], parts: Sequence[Part], documents: Sequence[str]):
    """A file of windows. `documents`: their names. OSError names the file."""
    pa = require("pyarrow", "scale")
    ids = [np.array(window.ids, np.int32) for window in windows]
    table = {"document": pa.array([documents[window.document] for window in windows]).dictionary_encode(),
             "document_number": pa.array([window.document for window in windows], pa.int32()),
             "first": pa.array([window.first for window in windows], pa.int32()),
             "ids": _lists(ids), "token": _lists([x[window.first:] for x, window in zip(ids, windows)])}
    for key in parts[0].columns:
        table[key] = _lists([part.columns[key] for part in parts])
    table["seconds"] = pa.array([part.seconds for part in parts], pa.float64())
    table["machine"] = pa.array([part.machine for part in parts]).dictionary_encode()
    write_parquet(path, pa.table(table), about)


def read_windows(path: Path) -> tuple[dict[str, object], list[Window], list[Part]]:
    """What `write_windows` wrote: (about, windows, parts). Raises ValueError, in one line, for anything else; OSError."""
    pa, parquet = require("pyarrow", "scale"), require("pyarrow.parquet", "scale")
    try:
        with Path(path).open("rb") as file:
            table = parquet.read_table(file, page_checksum_verification=True)
        about = json.loads(table.schema.metadata[KEY])
        first, number = (table[key].to_numpy() for key in ("first", "document_number"))
        ids = _arrays(table["ids"], "<i4")
        windows = [Window(int(d), tuple(x.tolist()), int(f)) for d, x, f in zip(number, ids, first)]
        if any(not 0 < window.first < len(window.ids) for window in windows):
            raise ValueError("has windows of nothing")
        columns = {key: _arrays(table[key], dtype) for key, dtype in COLUMNS.items() if key in table.column_names}
        for key, arrays in columns.items():
            if [len(x) for x in arrays] != [window.n_counted for window in windows]:
                raise ValueError(f"has a column {key} of another length")
        seconds, machines = table["seconds"].to_pylist(), table["machine"].to_pylist()
        parts = [Part({key: arrays[i] for key, arrays in columns.items()}, seconds[i], machines[i]) for i in range(len(windows))]
    except (KeyError, TypeError, AttributeError, ValueError, NotImplementedError, pa.ArrowException) as e:
        raise ValueError(f"{path}: is no run of refimpl eval, or a damaged one: {' '.join(str(e).split())}") from None
    except OSError as e:
        if e.errno is not None:
            raise
        raise ValueError(f"{path}: is no run of refimpl eval, or a damaged one: {' '.join(str(e).split())}") from None
    return about, windows, parts


def _lists(arrays: Sequence[np.ndarray]):
    """A column of lists, one for each array (n,) or (n, K)."""
    pa = require("pyarrow", "scale")
    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    values = pa.array(np.concatenate(arrays).ravel())
    if arrays[0].ndim == 2:
        values = pa.FixedSizeListArray.from_arrays(values, arrays[0].shape[1])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _arrays(column, dtype: str) -> list[np.ndarray]:
    """The arrays of such a column. Raises ValueError for other values."""
    pa = require("pyarrow", "scale")
    lists = column.combine_chunks()
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    offsets, values, width = lists.offsets.to_numpy(), lists.values, None
    if pa.types.is_fixed_size_list(values.type):
        values, width = values.values, values.type.list_size
    if lists.null_count or values.null_count or values.type != pa.from_numpy_dtype(np.dtype(dtype)):
        raise ValueError(f"has values of type {values.type}, expected {np.dtype(dtype)}")
    flat = values.to_numpy()
    flat = flat if width is None else flat.reshape(-1, width)
    return [flat[start:end] for start, end in zip(offsets[:-1], offsets[1:])]
