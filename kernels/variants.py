"""Which kernels there are: each source file with each set of defines that an op compiles it with.

`python -m kernels.build` and its test compile every line of `VARIANTS`, so a kernel that an op can
ask for and that does not compile, or spills, is found without a card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100")
"""A100; 3090; 4090; H100 and H200, without and with what only they have; B200."""


@dataclass(frozen=True)
class Variant:
    """One kernel as an op asks for it.

    Attributes:
        file: source, below `kernels/cuda`.
        function: name of the kernel, declared `extern "C"`.
        defines: macros.
        architectures: for which it exists.
    """

    file: str
    function: str
    defines: Mapping[str, int | str] = field(default_factory=dict)
    architectures: tuple[str, ...] = ARCHITECTURES


VARIANTS: tuple[Variant, ...] = ()
"""Every kernel of the ops."""
