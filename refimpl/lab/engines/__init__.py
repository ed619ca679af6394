"""Traces of other engines, live or from what they write."""
