"""Gemma 4: its configuration, weights, cache and forward pass."""
