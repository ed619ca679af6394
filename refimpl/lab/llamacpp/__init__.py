"""llama.cpp in a child process: process.py is the child, client.py talks to it. Imports nothing else of the package."""
