"""The reference's twins in Numba: the same files, functions and signatures. May import formats and kernels/machine; never reference."""
