"""Judges any engine over HTTP by its answers. May import files, lab/evaluate and lab/compare; prints nothing."""
