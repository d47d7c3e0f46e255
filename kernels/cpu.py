"""The packed linear maps a processor has."""

from __future__ import annotations

from kernels.aten import Int4Linear, Int8Linear

PACKED_LINEARS: dict[int, type[Int4Linear] | type[Int8Linear]] = {4: Int4Linear, 8: Int8Linear}
"""Bits -> the packed linear map; bits that are not here have none."""
