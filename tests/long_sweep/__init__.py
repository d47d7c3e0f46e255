"""A sweep of thousands of cells that measure nothing: what the driver and the report cost.

`python -m tests.long_sweep --cells 5000` runs it and prints the figures of `docs/scaling.md`.
"""
