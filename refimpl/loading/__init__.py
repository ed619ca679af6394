"""From a path or hf: name to a model in memory: download, open, translate Hugging Face's names and vocabularies, check memory, load.

May import model and text; chooses no tokens.
"""
