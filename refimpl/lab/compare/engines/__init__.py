"""The other side of a comparison: transformers, llama.cpp, dumps of any engine. May import lab/compare's traces and names."""
