"""The embedded demonstration model: its invented world, its text, its training and its weights."""
