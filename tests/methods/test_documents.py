"""The worked examples of the project's documents, computed by the code that quantizes models."""

from __future__ import annotations

import pytest
import torch

from methods.affine import SCALE_DTYPES, Affine, dequantize, quantize
from methods.base import Matrix
from methods.rtn import RTN


@pytest.mark.parametrize("scale_dtype", list(SCALE_DTYPES))
def test_symmetric_int8_of_five_weights(scale_dtype: str) -> None:
    weight = torch.tensor([[-2.5, -1.0, 0.0, 1.2, 3.8]])
    found = quantize("w", weight, Affine(8, symmetric=True, scale_dtype=scale_dtype))
    assert round(found.scale.item(), 4) == 0.0299
    assert (found.codes.int() - 128).tolist() == [[-84, -33, 0, 40, 127]]
    restored = [round(value, 2) for value in dequantize(found)[0].tolist()]
    assert restored == [-2.51, -0.99, 0.0, 1.2, 3.8]


def test_one_half_on_the_range_from_minus_one_to_one() -> None:
    weight = torch.tensor([[-1.0, 0.5, 1.0]])
    found = quantize("w", weight, Affine(8, scale_dtype="float32"))
    assert found.zero_point is not None
    assert found.scale.item() == pytest.approx(2 / 255)
    assert int(found.codes[0, 1]) - int(found.zero_point[0, 0]) == 64
    # 64 * 2 / 255. The document prints 0.50176, because it rounds the scale to 0.00784 first.
    assert dequantize(found)[0, 1].item() == pytest.approx(128 / 255)
    assert round(128 / 255, 5) == 0.50196
    assert round(64 * round(2 / 255, 5), 5) == 0.50176


def test_blocks_of_32_four_bit_weights_with_one_fp16_scale_are_4_5_bits_a_weight() -> None:
    method = RTN("q4_0", bits=4, group_size=32, symmetric=True)
    assert method.stored_bits(Matrix("block", "block", 1, 32)) == 144
    matrix = Matrix("layer", "block", out_features=4096, in_features=4096)
    assert method.stored_bits(matrix) / matrix.weights == 4.5


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_of_few_bits_take_a_quarter_or_an_eighth_of_float32(bits: int) -> None:
    matrix = Matrix("layer", "block", out_features=4096, in_features=4096)
    stored = RTN("rtn", bits, -1, symmetric=True).stored_bits(matrix)
    assert stored / (32 * matrix.weights) == pytest.approx(bits / 32, rel=2e-3)


def test_finer_granularity_is_more_accurate() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.linspace(0.1, 3, 32)[:, None]
    weight = torch.randn(32, 512, generator=generator) * rows

    def error(options: Affine) -> float:
        return float((dequantize(quantize("w", weight, options)) - weight).square().mean())

    tensor = error(Affine(4, -1, symmetric=True, per_tensor=True))
    channel = error(Affine(4, -1, symmetric=True))
    group = error(Affine(4, 128, symmetric=True))
    assert group < channel < tensor
