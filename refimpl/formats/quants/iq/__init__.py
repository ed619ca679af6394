"""The I types: weights as entries of a codebook. May import formats/quants."""
