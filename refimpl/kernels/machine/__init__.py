"""What the twins are built from: instruction sets, intrinsics, compilation, threads, weights in tiles. May import formats and host."""
