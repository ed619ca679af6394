"""The reference's twins in Numba, file by file and function by function. May import formats and kernels/machine; never reference."""
