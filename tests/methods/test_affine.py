"""Scale and zero point: the conventions, every search, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods import affine
from methods.affine import BITS, SCALE_DTYPES, Affine, dequantize, fake_quantize, quantize


def normal(out: int = 24, width: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator) * 0.05


def error(weight: Tensor, options: Affine) -> float:
    return float((fake_quantize("w", weight, options) - weight).square().sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 16, 40])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_scales_and_zeros_by_the_formula_group_by_group(
    bits: int, group_size: int, symmetric: bool
) -> None:
    weight = normal(3, 80)
    options = Affine(bits, group_size, symmetric, scale_dtype="float32")
    found = quantize("w", weight, options)
    size = 80 if group_size == -1 else group_size
    for row in range(3):
        for group in range(80 // size):
            values = weight[row, group * size : (group + 1) * size].double()
            codes = found.codes[row, group * size : (group + 1) * size].double()
            scale = found.scale[row, group].double()
            if symmetric:
                expected = values.abs().max() / (2 ** (bits - 1) - 1)
                q = (values / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                assert found.zero_point is None
                assert torch.equal(codes - 2 ** (bits - 1), q)
            else:
                low, high = values.min().clamp(max=0), values.max().clamp(min=0)
                expected = (high - low) / (2**bits - 1)
                assert found.zero_point is not None
                zero = found.zero_point[row, group].double()
                assert zero == (-low / scale).round()
                assert torch.equal(codes, ((values / scale).round() + zero).clamp(0, 2**bits - 1))
            torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    restored = dequantize(found)
    zeros = 2 ** (bits - 1) if found.zero_point is None else found.zero_point[:, :, None].float()
    by_hand = (found.codes.reshape(3, -1, size).float() - zeros) * found.scale[:, :, None]
    torch.testing.assert_close(restored, by_hand.reshape(3, 80))


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_is_further_off_than_half_a_step(symmetric: bool) -> None:
    weight = normal()
    found = quantize("w", weight, Affine(4, 32, symmetric, scale_dtype="float32"))
    step = found.scale.repeat_interleave(32, dim=1)
    inside = (dequantize(found) - weight).abs() <= step * 0.5001
    # The zero point is rounded too: an asymmetric range can lose up to half a step at one end.
    assert inside.float().mean() > (0.999 if symmetric else 0.95)
    assert ((dequantize(found) - weight).abs() <= step * 1.001).all()


def test_the_scale_is_rounded_before_the_codes_are_computed() -> None:
    weight = normal(64, 256)
    found = quantize("w", weight, Affine(8, -1, symmetric=True, scale_dtype="bfloat16"))
    assert found.scale.dtype == torch.bfloat16
    codes = (weight / found.scale.float()).round().clamp(-128, 127)
    assert torch.equal(found.codes.float() - 128, codes)
    unrounded = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round()
    assert not torch.equal(found.codes.float() - 128, unrounded)


def test_ties_go_to_the_even_level() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.0, -7.0]])
    found = quantize("w", weight, Affine(4, symmetric=True))
    assert found.scale.item() == 1
    assert (found.codes.int() - 8).tolist() == [[0, 2, 2, 0, -2, -2, 7, -7]]


def test_two_bits_symmetric_are_ternary() -> None:
    codes = quantize("w", normal(), Affine(2, 32, symmetric=True)).codes.int() - 2
    assert set(codes.flatten().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", affine.SEARCHES)
def test_groups_of_zeros_and_of_one_value(bits: int, symmetric: bool, search: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2], weight[3, 32:] = 0.75, -3.0, 1e-3
    options = Affine(bits, 32, symmetric, scale_search=search, scale_dtype="float32")
    found = quantize("w", weight, options)
    assert (found.scale > 0).all()
    restored = dequantize(found)
    assert not restored[0].any(), "zeros stay exact zeros"
    torch.testing.assert_close(restored, weight, rtol=1e-5, atol=0)


def test_error_grows_from_8_to_2_bits_and_with_the_group() -> None:
    weight = normal(32, 1024)
    for symmetric in (True, False):
        by_bits = [error(weight, Affine(bits, 64, symmetric)) for bits in BITS]
        assert by_bits == sorted(by_bits)
        assert len(set(by_bits)) == len(BITS)
        sizes = (16, 32, 64, 128, 256, 512, 1024, -1)
        by_group = [error(weight, Affine(3, size, symmetric)) for size in sizes[:-1]]
        assert by_group == sorted(by_group)
        tensor = error(weight, Affine(3, -1, symmetric, per_tensor=True))
        assert by_group[-1] < tensor


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "per_tensor"), [(32, False), (-1, False), (-1, True)])
def test_the_mse_search_is_never_worse_than_min_max(
    bits: int, symmetric: bool, group_size: int, per_tensor: bool
) -> None:
    weight = normal(16, 128, seed=bits)
    weight[3, 5] = 0.6  # an outlier, which min/max follows
    plain = Affine(bits, group_size, symmetric, per_tensor)
    searched = Affine(bits, group_size, symmetric, per_tensor, "mse")

    def by_scale(options: Affine) -> Tensor:
        difference = (fake_quantize("w", weight, options) - weight).double().square()
        if per_tensor:
            return difference.sum()
        grouped: Tensor = difference.view(16, -1, 32 if group_size == 32 else 128)
        return grouped.sum(-1)

    assert (by_scale(searched) <= by_scale(plain) * (1 + 1e-6)).all()
    if bits < 4:
        assert error(weight, searched) < 0.95 * error(weight, plain)


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_cuts_at_the_quantile(symmetric: bool) -> None:
    weight = normal(8, 512)
    options = Affine(8, -1, symmetric, False, "percentile", 97.0, "float32")
    scale = quantize("w", weight, options).scale[:, 0]
    if symmetric:
        expected = weight.abs().quantile(0.97, dim=1) / 127
    else:
        expected = (weight.quantile(0.97, dim=1) - weight.quantile(0.03, dim=1)) / 255
    torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0)
    whole = Affine(8, -1, symmetric, False, "percentile", 100.0, "float32")
    minmax = Affine(8, -1, symmetric, False, "minmax", scale_dtype="float32")
    assert torch.equal(quantize("w", weight, whole).scale, quantize("w", weight, minmax).scale)


def test_percentile_over_a_whole_matrix() -> None:
    weight = normal(16, 64)
    options = Affine(4, -1, True, True, "percentile", 95.0, "float32")
    found = quantize("w", weight, options)
    assert found.scale.shape == (1, 1)
    expected = weight.abs().flatten().quantile(0.95) / 7
    torch.testing.assert_close(found.scale[0, 0], expected, rtol=1e-5, atol=0)


def test_one_scale_a_matrix_in_a_stack_is_one_an_expert() -> None:
    stack = torch.stack([normal(8, 32, seed) * (seed + 1) for seed in range(3)])
    found = quantize("w", stack, Affine(4, per_tensor=True))
    assert found.codes.shape == (3, 8, 32)
    assert found.scale.shape == (3, 1, 1)
    for index in range(3):
        alone = quantize("w", stack[index], Affine(4, per_tensor=True))
        assert torch.equal(found.codes[index], alone.codes)
        assert torch.equal(found.scale[index], alone.scale)


def test_a_ragged_width_is_filled_and_cut_again() -> None:
    weight = normal(4, 172)
    found = quantize("w", weight, Affine(4, 64))
    assert found.codes.shape == (4, 192)
    assert found.scale.shape == (4, 3)
    assert dequantize(found).shape == (4, 172)
    full = quantize("w", weight[:, :128], Affine(4, 64))
    assert torch.equal(found.codes[:, :128], full.codes)


@pytest.mark.parametrize("search", affine.SEARCHES)
@pytest.mark.parametrize("per_tensor", [True, False])
def test_chunks_change_nothing(
    search: str, per_tensor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(37, 96)
    options = Affine(3, -1, False, per_tensor, search)
    whole = quantize("w", weight, options)
    monkeypatch.setattr(affine, "CHUNK_WEIGHTS", 5 * 96)
    chunked = quantize("w", weight, options)
    assert torch.equal(whole.codes, chunked.codes)
    assert torch.equal(whole.scale, chunked.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_types_of_weights_and_transposed_views_are_read_as_they_are(
    dtype: torch.dtype,
) -> None:
    weight = normal(16, 48).to(dtype)
    expected = fake_quantize("w", weight.float(), Affine(4, 16))
    assert torch.equal(fake_quantize("w", weight.T.contiguous().T, Affine(4, 16)), expected)


def test_a_scale_beyond_float16_is_refused_and_float32_holds_it() -> None:
    weight = normal(4, 64) * 1e8
    with pytest.raises(ConfigError, match=r"weight a\.b needs a scale .* float16 .* 6\.55e\+04"):
        quantize("a.b", weight, Affine(4, 32))
    found = quantize("a.b", weight, Affine(4, 32, scale_dtype="float32"))
    assert torch.isfinite(dequantize(found)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-5, 1e-7, 1e-9])
def test_a_scale_below_float16_is_never_zero(symmetric: bool, size: float) -> None:
    weight = normal(4, 64) * size
    found = quantize("w", weight, Affine(4, 32, symmetric))
    assert (found.scale > 0).all()
    assert found.subnormal_scales == found.scale.numel()
    # Rounded up, so nothing is cut: no weight is further off than a step.
    assert ((dequantize(found) - weight).abs() <= found.scale.float().max() * 1.001).all()
    exact = quantize("w", weight, Affine(4, 32, symmetric, scale_dtype="float32"))
    assert exact.subnormal_scales == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    weight = normal()
    weight[7, 9] = value
    with pytest.raises(ConfigError, match=r"weight model\.x holds 1 values"):
        quantize("model.x", weight, Affine(4, 32))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 5}, "bits is 5; weights can have 8, 4, 3 or 2 bits"),
        ({"bits": 4.0}, "weights can have 8, 4, 3 or 2 bits"),
        ({"group_size": 0}, "group_size is 0; it must be 16 to 1024 inputs, or -1"),
        ({"group_size": 8}, "group_size is 8; it must be"),
        ({"group_size": 2048}, "group_size is 2048; it must be"),
        ({"group_size": None}, "group_size is None; it must be"),
        ({"group_size": 32, "per_tensor": True}, "set group_size=-1"),
        ({"scale_search": "best"}, "must be one of minmax, percentile, mse, kl"),
        ({"percentile": 50}, "percentile is 50"),
        ({"scale_dtype": "float8"}, "must be one of float16, bfloat16, float32"),
    ],
)
def test_options_outside_their_range_are_one_sentence(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Affine(**{"bits": 4, **options})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_named_scale_type_is_stored() -> None:
    for name, dtype in SCALE_DTYPES.items():
        assert quantize("w", normal(), Affine(4, 32, scale_dtype=name)).scale.dtype == dtype
