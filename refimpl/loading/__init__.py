"""From a path to a model in memory: opening, downloading, Hugging Face names, the memory check.

May import model and text; chooses no tokens.
"""
