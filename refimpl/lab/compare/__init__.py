"""Judging other engines: traces, tolerances, the first tensor that departs and why. May import files, lab/llamacpp and lab/engines.py."""
