"""Hostile input for every reader of a file that the project did not write a moment ago.

A target (`tests.fuzz.target.Target`) is one reader. It may return, or refuse with the error that
its docstring names; it may not crash, hang, take memory without bound, or touch a path outside its
folder. `python -m tests.fuzz.run` searches for inputs that break this, guided by coverage
(atheris); `tests/fuzz/test_fuzz.py` is a short run of the same targets with hypothesis.
"""
