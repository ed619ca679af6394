"""File formats and number formats: GGUF, safetensors, and the codecs of their block types."""
