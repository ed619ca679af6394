"""Files as bytes and arrays: containers (GGUF, safetensors, checkpoints), TensorSource over them, and the matrices in them.

May import formats/quants; knows nothing of models.
"""
