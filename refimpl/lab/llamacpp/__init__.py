"""llama.cpp in a child process: process.py is the child, client.py talks to it. Imports extras.py, nothing else of the package."""
