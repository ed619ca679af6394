"""Block types: what every quantized weight type looks like, decoding and encoding. May import numpy; knows nothing of files or models."""
