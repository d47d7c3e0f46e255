"""Faults injected into real runs: kills, full disks, wrong clocks, damaged files, signals.

`pytest tests/faults` is the short form, `python -m tests.faults` the long one with the counts of
`docs/reliability.md`. After each fault a second run of the same command has to complete.
"""
