"""The textbook: NumPy, float32, no cleverness. Whoever wants it faster writes a twin with the same name and signature."""
