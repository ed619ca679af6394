"""An HTTP server for other programs: batching (scheduler, engine) and, in api/, what clients of OpenAI, Anthropic and llama-server expect.

May import everything below the command line, and Starlette, uvicorn, msgspec and prometheus-client, which only this room needs.
"""
