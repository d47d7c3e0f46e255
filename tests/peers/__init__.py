"""Other tools run on the same checkpoints, to be compared with."""
