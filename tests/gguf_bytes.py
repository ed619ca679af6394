"""GGUF files built byte by byte, so that tests can make the malformed ones that no writer would write."""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
TYPE_F32, TYPE_F16, TYPE_Q4_0 = 0, 1, 2


def string(text: str | bytes) -> bytes:
    """Length and bytes."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(type_id: int, x) -> bytes:
    """A metadata value without its type."""
    return string(x) if type_id == STRING else struct.pack("<" + FORMATS[type_id], x)


def key(name: str | bytes, type_id: int, payload) -> bytes:
    """A metadata record; `payload` given as bytes goes in as it is."""
    return string(name) + struct.pack("<I", type_id) + (payload if isinstance(payload, bytes) else value(type_id, payload))


def array_key(name: str, item_id: int, items=(), count: int | None = None, raw: bytes | None = None) -> bytes:
    """A metadata array; `count` and `raw` override the honest ones."""
    body = b"".join(value(item_id, x) for x in items) if raw is None else raw
    return key(name, ARRAY, struct.pack("<IQ", item_id, len(items) if count is None else count) + body)


def tensor(name: str | bytes, dims, type_id: int = TYPE_F32, offset: int = 0, n_dims: int | None = None) -> bytes:
    """A tensor record; `dims` in ggml's order, fastest first."""
    n_dims = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack("<I", n_dims) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", type_id, offset)


def gguf(keys=(), tensors=(), data: bytes = b"", *, alignment: int = 32, n_keys: int | None = None, n_tensors: int | None = None,
         magic: bytes = b"GGUF", version: bytes = struct.pack("<I", 3)) -> bytes:
    """A whole file."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    head = magic + version + struct.pack("<QQ", n_tensors, len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if tensors else head
