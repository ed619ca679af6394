"""The textbook: every function that costs time, in NumPy as on a whiteboard. May import formats; never kernels, which it judges."""
