"""What the kernels are made of: instruction sets, intrinsics, compiling, threads, weights in tiles.

May import formats and host; no twins.
"""
