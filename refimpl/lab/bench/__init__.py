"""Speed of a model, of drafting, of every weight type, beside what the machine allows. May import files, lab/llamacpp, lab/engines.py."""
