"""llama.cpp in a process of its own. Imports nothing of lab."""
