"""Limits are read strictly: a number and a unit of its kind, or one sentence."""

from __future__ import annotations

import pytest

from harness.units import BYTES, PLAIN, SECONDS, SHARES, parse
from kernels.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "units", "wanted"),
    [
        ("3%", SHARES, 0.03),
        (0.03, SHARES, 0.03),
        ("8GB", BYTES, 8e9),
        ("8 GiB", BYTES, 8 * 2**30),
        ("500MB", BYTES, 5e8),
        (1000, BYTES, 1000.0),
        ("20ms", SECONDS, 0.02),
        ("1.5s", SECONDS, 1.5),
        ("1e-3", SECONDS, 1e-3),
        (12.5, PLAIN, 12.5),
    ],
)
def test_quantities(given: str | float, units: dict[str, float], wanted: float) -> None:
    assert parse(given, units, "job.limit") == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("given", "units"),
    [
        ("3 percent", SHARES),
        ("3GB", SHARES),
        ("8gb", BYTES),
        ("-1", BYTES),
        ("0", SECONDS),
        ("20 minutes", SECONDS),
        ("nan", PLAIN),
        ("5%", PLAIN),
        (True, PLAIN),
        ("1e999", PLAIN),
    ],
)
def test_anything_else_is_refused_by_name(given: str | float, units: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"job\.limit is .*; it must be a number above 0"):
        parse(given, units, "job.limit")


def test_a_share_of_one_or_more_has_to_say_per_cent() -> None:
    with pytest.raises(ConfigError, match=r"job\.limit is 3, a share of 300 %; write 3%"):
        parse(3, SHARES, "job.limit")
    assert parse("300%", SHARES, "job.limit") == 3.0
