"""Packed weights: their layout, the ops that read them, and the plain PyTorch truth of each op.

Nothing is imported here: `transformers` looks for a distribution of this name, and must find no
more than a docstring.
"""
