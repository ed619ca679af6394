"""llama.cpp in a child process: process.py is the child, client.py talks to it. May import formats and host; nothing else of lab."""
