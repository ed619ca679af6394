"""The K types: blocks of 256 with integer scales for sub-blocks. May import formats/quants."""
