"""Perplexity and KL divergence over texts, in one process or many. May import files, lab/llamacpp, lab/bench and lab's own modules."""
