"""Limits as people write them: `3%`, `8GB`, `20ms`; plain numbers are shares, bytes and seconds."""

from __future__ import annotations

import math
import re

from kernels.errors import ConfigError

SHARES = {"": 1.0, "%": 0.01}
BYTES = {
    "": 1.0,
    "B": 1.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
PLAIN = {"": 1.0}

_NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*(.*)")


def parse(given: str | float, units: dict[str, float], name: str) -> float:
    """Return the quantity `given` in the plain unit of `units`, one of the tables above.

    Raises:
        ConfigError: it is no number above 0, or of no such unit.
    """
    match = _NUMBER.fullmatch(str(given).strip())
    value = float(match[1]) * units.get(match[2], math.nan) if match else math.nan
    if not 0 < value < math.inf or isinstance(given, bool):
        shown = ", ".join(f"0.5{unit}" for unit in units)
        raise ConfigError(f"{name} is {given!r}; it must be a number above 0 such as {shown}")
    if units is SHARES and match and not match[2] and value >= 1:
        # 3 would be 300 %: rather asked than let pass.
        raise ConfigError(f"{name} is {given!r}, a share of {100 * value:g} %; write {value:g}%")
    return value
