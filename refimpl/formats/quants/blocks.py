"""The table of block types: how many bytes hold how many elements, and in which fields.

A quantized tensor is stored row by row, each row a whole number of blocks:

    raw bytes (*lead, row_bytes)            row_bytes = n_blocks * block.n_bytes
         |  fields_of
    fields    (*lead, n_blocks)             one record a block: fields["d"], fields["qs"], ...
         |  dequantize_NAME
    float32   (*lead, n_blocks * block.elements)

Every file that asks "how large?" or "where is the scale?" asks this table. Multi-byte fields are little-endian,
as GGUF stores them. Source: the block_* structs of ggml-common.h and the enum ggml_type of ggml.h (llama.cpp).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Block:
    """One block type: its name, the elements a block holds, and its fields in the order they are stored.

    A field is (name, little-endian NumPy dtype, count); a count of 1 gives a scalar, not a length-1 axis.
    """

    name: str
    elements: int
    fields: tuple[tuple[str, str, int], ...]

    @property
    def dtype(self) -> np.dtype:
        """The packed (unpadded) structured dtype of one block."""
        return np.dtype([(field, kind, (count,)) if count > 1 else (field, kind) for field, kind, count in self.fields])

    @property
    def n_bytes(self) -> int:
        """Bytes of one block."""
        return self.dtype.itemsize

    def row_bytes(self, n_elements: int) -> int:
        """Bytes of a row of `n_elements`, which must be a whole number of blocks."""
        if n_elements % self.elements:
            raise ValueError(f"{self.name}: a row of {n_elements} elements is not a whole number of blocks of {self.elements}")
        return n_elements // self.elements * self.n_bytes


def _scalar(name: str, kind: str) -> Block:
    return Block(name, 1, (("x", kind, 1),))


_TABLE = (
    # Plain numbers: a block of one element.
    _scalar("F32", "<f4"),
    _scalar("F16", "<f2"),
    _scalar("BF16", "<u2"),  # the upper half of a float32; NumPy has no such dtype
    _scalar("F64", "<f8"),
    _scalar("I8", "<i1"),
    _scalar("I16", "<i2"),
    _scalar("I32", "<i4"),
    _scalar("I64", "<i8"),
    # 32 elements under one scale d; the _1 types add a minimum m.
    Block("Q4_0", 32, (("d", "<f2", 1), ("qs", "u1", 16))),
    Block("Q4_1", 32, (("d", "<f2", 1), ("m", "<f2", 1), ("qs", "u1", 16))),
    Block("Q5_0", 32, (("d", "<f2", 1), ("qh", "<u4", 1), ("qs", "u1", 16))),
    Block("Q5_1", 32, (("d", "<f2", 1), ("m", "<f2", 1), ("qh", "<u4", 1), ("qs", "u1", 16))),
    Block("Q8_0", 32, (("d", "<f2", 1), ("qs", "i1", 32))),
    # 256 elements in 8 or 16 sub-blocks, whose scales are themselves quantized.
    Block("Q2_K", 256, (("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2", 1), ("dmin", "<f2", 1))),
    Block("Q3_K", 256, (("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2", 1))),
    Block("Q4_K", 256, (("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qs", "u1", 128))),
    Block("Q5_K", 256, (("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128))),
    Block("Q6_K", 256, (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2", 1))),
    # 4 bits that choose from a table.
    Block("IQ4_NL", 32, (("d", "<f2", 1), ("qs", "u1", 16))),
    Block("IQ4_XS", 256, (("d", "<f2", 1), ("scales_h", "<u2", 1), ("scales_l", "u1", 4), ("qs", "u1", 128))),
    Block("MXFP4", 32, (("e", "u1", 1), ("qs", "u1", 16))),
    # 256 elements as vectors of 8 or 4 out of a codebook (codebooks.py), signs and steps beside them.
    Block("IQ3_S", 256, (("d", "<f2", 1), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4))),
    Block("IQ3_XXS", 256, (("d", "<f2", 1), ("qs", "u1", 64), ("signs", "<u4", 8))),
    Block("IQ2_S", 256, (("d", "<f2", 1), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8))),
    Block("IQ2_XS", 256, (("d", "<f2", 1), ("qs", "<u2", 32), ("scales", "u1", 8))),
    Block("IQ2_XXS", 256, (("d", "<f2", 1), ("qs", "<u4", 16))),
    Block("IQ1_M", 256, (("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4))),
    Block("IQ1_S", 256, (("d", "<f2", 1), ("qs", "u1", 32), ("qh", "<u2", 8))),
    # Few bits and one scale: ternary digits, 4-bit floats, one or two bits.
    Block("TQ1_0", 256, (("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2", 1))),
    Block("TQ2_0", 256, (("qs", "u1", 64), ("d", "<f2", 1))),
    Block("NVFP4", 64, (("d", "u1", 4), ("qs", "u1", 32))),
    Block("Q1_0", 128, (("d", "<f2", 1), ("qs", "u1", 16))),
    Block("Q2_0", 64, (("d", "<f2", 1), ("qs", "u1", 16))),
    # What ggml quantizes activations to. (Of Q8_1, gguf-py's table still says 40 bytes: two floats, an older layout.)
    Block("Q8_1", 32, (("d", "<f2", 1), ("s", "<f2", 1), ("qs", "i1", 32))),
    Block("Q8_K", 256, (("d", "<f4", 1), ("qs", "i1", 256), ("bsums", "<i2", 16))),
)

BLOCKS: dict[str, Block] = {block.name: block for block in _TABLE}

# The ggml_type number a GGUF file stores, to the name. The gaps are types ggml has removed.
TYPE_IDS: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip


def fields_of(raw: np.ndarray, block: Block) -> np.ndarray:
    """View raw bytes as blocks, copying nothing: uint8 (*lead, row_bytes) -> records (*lead, n_blocks).

    The leading axes may have any stride (a slice of a memory map); the bytes of a row must be contiguous (or NumPy refuses).
    """
    if raw.dtype != np.uint8 or raw.ndim == 0:
        raise ValueError(f"{block.name}: expected raw bytes as a uint8 array of rows, got {raw.dtype} of shape {raw.shape}")
    row_bytes = raw.shape[-1]
    if row_bytes % block.n_bytes:
        raise ValueError(f"{block.name}: a row of {row_bytes} bytes is not a whole number of blocks of {block.n_bytes}")
    return raw.view(block.dtype)


def blocks_of(x: np.ndarray, block: Block) -> np.ndarray:
    """Cut float32 rows (*lead, D) into blocks (*lead, n_blocks, elements): what a quantizer works on."""
    if x.dtype != np.float32 or x.ndim == 0:
        raise ValueError(f"{block.name}: expected rows of float32 to quantize, got {x.dtype} of shape {x.shape}")
    block.row_bytes(x.shape[-1])  # refuses a row that is not a whole number of blocks
    return x.reshape(*x.shape[:-1], x.shape[-1] // block.elements, block.elements)


def rows_of(values: np.ndarray) -> np.ndarray:
    """Join the blocks of a row again: (*lead, n_blocks, n) -> (*lead, n_blocks * n)."""
    return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])


def bytes_of(block: Block, **fields: np.ndarray) -> np.ndarray:
    """Store fields as raw bytes, the inverse of `fields_of`: arrays (*lead, n_blocks[, count]) -> uint8 (*lead, row_bytes)."""
    first, _, count = block.fields[0]
    records = np.empty(fields[first].shape[: -1 if count > 1 else None], block.dtype)
    for name, _, _ in block.fields:
        records[name] = fields[name]
    return records.view(np.uint8)


def unpack(packed: np.ndarray, n_bits: int, group: int) -> np.ndarray:
    """Unpack small integers: uint8 (..., n) -> uint8 (..., n * 8 // n_bits).

    Bytes go in groups. Byte i of a group holds elements i, i + group, i + 2 * group, ... from its low bits up, so one shift
    and one mask give `group` neighbours at a time. Nibbles (n_bits = 4):

        bits   7..4           3..0
             | i + group    | i            |     i = 0 .. group-1
    """
    *lead, n = packed.shape
    shifts = np.arange(0, 8, n_bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(*lead, n // group, 1, group) >> shifts
    return (fields & np.uint8(2**n_bits - 1)).reshape(*lead, n * 8 // n_bits)


def pack(values: np.ndarray, n_bits: int, group: int) -> np.ndarray:
    """Pack small integers, the inverse of `unpack`: uint8 (..., n) below 2**n_bits -> uint8 (..., n * n_bits // 8)."""
    *lead, n = values.shape
    per_byte = 8 // n_bits
    shifts = np.arange(0, 8, n_bits, dtype=np.uint8)[:, None]
    fields = values.reshape(*lead, n // (group * per_byte), per_byte, group) << shifts
    return np.bitwise_or.reduce(fields, axis=-2).reshape(*lead, n // per_byte)
