"""`python -m reports diff A B`: what changed between two sets of records."""
