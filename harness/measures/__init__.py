"""One measure a file: what is asked of an engine, under which protocol."""
