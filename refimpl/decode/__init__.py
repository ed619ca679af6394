"""Text to tokens and back: tokenizer, chat template, sampling, and the loops that generate."""
