"""Block types with one scale a block (and at most one minimum): Q4_0 to Q8_0, ternary, microscaling floats. May import formats/quants."""
