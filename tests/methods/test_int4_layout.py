"""The documents' INT4 layout against their own arithmetic, written out value by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.errors import ConfigError
from kernels.pack import pack, unpack
from methods.affine import Affine, Quantized, dequantize, quantize
from methods.int4_layout import join_high_first, read_int4, split_high_first, write_int4

GROUP = 128


def document_packs(values: list[int]) -> list[int]:
    """Section 3.1, `pack_int4_weights`: (first << 4) | (second & 0xF), as a byte."""
    filled = values + [0] * (len(values) % 2)
    return [((a << 4) | (b & 0xF)) & 0xFF for a, b in zip(filled[::2], filled[1::2], strict=True)]


def document_rounds(group: Tensor, symmetric: bool) -> tuple[list[int], float, int]:
    """Section 1.1, `linear_quantization` with 4 bits: values, scale, zero point."""
    low, high = float(group.min()), float(group.max())
    if symmetric:
        scale, zero, least, most = max(abs(low), abs(high)) / 7, 0, -8, 7
    else:
        scale, least, most = (high - low) / 15, 0, 15
        zero = max(0, min(15, -round(low / scale)))
    rounded = torch.clamp(torch.round(group / scale + zero), least, most)
    return [int(value) for value in rounded], scale, zero


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(6, 2 * GROUP, generator=torch.Generator().manual_seed(0))


def of_document(weight: Tensor, symmetric: bool) -> dict[str, object]:
    """Section 3.1, `quantize_with_grouping`."""
    found = [document_rounds(group, symmetric) for group in weight.view(-1, GROUP).unbind()]
    return {
        "packed_weight": torch.tensor(
            document_packs([v for values, _, _ in found for v in values]), dtype=torch.uint8
        ),
        "scales": torch.tensor([scale for _, scale, _ in found]),
        "zero_points": torch.tensor([zero for _, _, zero in found]),
        "original_shape": weight.shape,
        "group_size": GROUP,
    }


def test_the_first_value_is_in_the_high_nibble_and_ours_in_the_low_one() -> None:
    values = [3, -2, 7, -8, -1]
    assert document_packs(values) == [0x3E, 0x78, 0xF0]
    joined = join_high_first(torch.tensor(values))
    assert joined.tolist() == [0x3E, 0x78, 0xF0]
    assert split_high_first(joined, signed=True).tolist() == [*values, 0]
    assert split_high_first(joined, signed=False).tolist() == [3, 14, 7, 8, 15, 0]
    ours = pack(torch.tensor([[3, 14, 7, 8, 15, 0]], dtype=torch.uint8), 4)
    assert ours.tolist() == [[0xE3, 0x87, 0x0F]]
    assert unpack(ours, 4).tolist() == [[3, 14, 7, 8, 15, 0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_document_writes_is_read(weight: Tensor, symmetric: bool) -> None:
    result = of_document(weight, symmetric)
    found = read_int4(result, symmetric)
    groups = [document_rounds(group, symmetric) for group in weight.view(-1, GROUP).unbind()]
    expected = torch.cat(
        [
            torch.tensor(scale) * (torch.tensor(values).float() - zero)
            for values, scale, zero in groups
        ]
    )
    assert torch.equal(dequantize(found), expected.view(weight.shape))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_document_and_our_rounding_are_one(weight: Tensor, symmetric: bool) -> None:
    """With scales in float32, and groups on both sides of zero."""
    ours = quantize("w", weight, Affine(4, GROUP, symmetric, scale_dtype="float32"))
    theirs = read_int4(of_document(weight, symmetric), symmetric)
    assert torch.equal(ours.codes, theirs.codes)
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-6, atol=0)
    assert (ours.zero_point is None) == symmetric
    if ours.zero_point is not None and theirs.zero_point is not None:
        assert torch.equal(ours.zero_point, theirs.zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, GROUP, -1])
def test_written_and_read_again_nothing_has_changed(
    weight: Tensor, group_size: int, symmetric: bool
) -> None:
    before = quantize("w", weight, Affine(4, group_size, symmetric))
    after = read_int4(write_int4(before), symmetric)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scale, before.scale.float())
    assert torch.equal(dequantize(after), dequantize(before))


def test_one_scale_for_the_matrix_is_repeated(weight: Tensor) -> None:
    before = quantize("w", weight, Affine(4, -1, symmetric=True, per_tensor=True))
    result = write_int4(before)
    assert result["scales"].tolist() == [float(before.scale)] * len(weight)
    assert torch.equal(dequantize(read_int4(result, symmetric=True)), dequantize(before))


def test_what_does_not_fit_is_one_sentence(weight: Tensor) -> None:
    result = write_int4(quantize("w", weight, Affine(4, GROUP)))
    with pytest.raises(ConfigError, match="no multiple of group_size 128"):
        read_int4({**result, "original_shape": (8, 192)}, symmetric=False)
    with pytest.raises(ConfigError, match="12 scales and 12 zero points do not make a matrix"):
        read_int4({**result, "original_shape": (5, 256)}, symmetric=False)
    with pytest.raises(ConfigError, match="read them with symmetric=False"):
        read_int4(result, symmetric=True)
    wide = quantize("w", weight, Affine(8, GROUP))
    stack = Quantized(wide.codes[None], wide.scale[None], None, 4, 256, 0)
    for refused in (wide, stack):
        with pytest.raises(ConfigError, match="no place in the documents' INT4 layout"):
            write_int4(refused)
