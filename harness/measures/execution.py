"""What an engine says of how it runs, and what that means for the measures."""

from __future__ import annotations

from methods.base import Engine


def is_simulated(engine: Engine) -> bool:
    """Whether a matrix holds rounded values stored as floats.

    Such an engine is worth measuring for quality only: its bytes, memory and speed are those of the
    floats, not of the format that the method stands for.
    """
    return any(use.execution == "simulated" for use in engine.kernels())


def decoding(engine: Engine) -> str | None:
    """Return what decodes a token of a PyTorch engine; None where the runtime is all that does."""
    found = getattr(engine, "decoding", None)
    return None if found is None else str(found)
