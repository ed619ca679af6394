"""One file for each API: its request to a `Want` (asking.py), the parts of the answers (answering.py) to its JSON. May import serve."""
