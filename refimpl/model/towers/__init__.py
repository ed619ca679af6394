"""The parts of Gemma 4 that see and hear: from patches of an image, or frames of sound, to soft tokens. May import model.

A soft token is a row as wide as the text model, which takes it where it takes the embedding of a word.
"""
