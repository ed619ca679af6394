"""Text and token ids: the tokenizer and the chat template. Imports no model: whoever loads one makes a tokenizer from its metadata."""
