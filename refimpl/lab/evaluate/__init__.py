"""Perplexity and KL divergence over texts. May import files and lab/llamacpp."""
