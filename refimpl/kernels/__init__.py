"""The same functions as in `reference`, for speed: Numba, and vectors through the small vocabulary of `simd`."""
