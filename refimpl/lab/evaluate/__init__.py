"""Perplexity and KL divergence over texts. May import files, lab/llamacpp and lab/engines.py."""
