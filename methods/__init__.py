"""One quantization method a file: how a model becomes an artefact, and an artefact an engine."""
