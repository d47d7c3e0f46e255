"""What the five documents say, and what holds of it."""
