"""From a composed configuration to a record: cells, child processes, measures."""
