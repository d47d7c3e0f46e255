"""`python -m reports recommend`: which measured rows keep the limits, and which to take."""
