"""The processor as the kernels find it: what it can do, how many threads compute on it. Imports `host` only; Numba inside of functions."""
