"""What `chat` is made of: turns, commands, the line on the terminal, transcripts. Imports what the command line's room may."""
