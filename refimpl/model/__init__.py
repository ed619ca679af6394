"""Gemma 4 and nothing else: configuration, weights, cache, the forward pass, the drafter's.

May import reference and kernels; knows no file layouts but tensor names.
"""
