"""The part of a hardware configuration that a method asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """`methods.base.Hardware` without the harness."""

    device: str = "cpu"
    compute_dtype: str = "float32"
    allow_fallback: bool = True
    usable_threads: int = 1
    gpu_layers: int | None = None
    offload: str | None = None
    resident_bytes: int = 0
    decode: str = "auto"
