"""ZeroQuant: the layers against exact integer products, and the way through an artefact."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from harness.load import meta_model
from kernels.errors import ConfigError
from methods.artefact import WEIGHTS
from methods.base import Method
from methods.layers import bias_of, weight_of
from methods.rounded_activations import STACKED_EXPERTS
from methods.zeroquant import TokenLinear, ZeroQuant
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence, round_trip
from tests.methods.layer_checks import bits_on_disk, passed_through
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method" / "zeroquant.yaml"
KINDS = ("llama", "llama_tied", "qwen2", "gpt2", "mixtral", "opt")


def zeroquant(bits: int = 8, group_size: int = 16, **options: Any) -> ZeroQuant:
    return ZeroQuant("zeroquant", bits, group_size, **options)


def integer_product(x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, size: int) -> Any:
    """Return float64 [tokens, out]: exact integer sums of each group, then the three scales."""
    tokens, w = x.flatten(0, -2).numpy(), weight.numpy()
    step = np.abs(tokens).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(tokens / step).astype(np.int64)
    total = np.zeros((len(tokens), len(w)))
    for start in range(0, w.shape[1], size):
        group = w[:, start : start + size]
        largest = np.abs(group).max(1, keepdims=True)
        scale = (largest / np.float32(2 ** (bits - 1) - 1)).astype(np.float16).astype(np.float32)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        levels = np.clip(np.rint(group / scale), low, high).astype(np.int64)
        total += (codes[:, start : start + size] @ levels.T) * scale[:, 0].astype(np.float64)
    total *= step
    return total if bias is None else total + bias.numpy()


def test_it_is_a_method() -> None:
    method: Method = zeroquant(4, 32)
    assert (method.name, method.bits, method.group_size) == ("zeroquant", 4, 32)
    assert not method.needs_calibration


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, 16), (4, 16), (4, -1)])
def test_layers_give_the_integer_product(
    kind: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    report, engine = round_trip(zeroquant(bits, group_size), tiny(kind), tmp_path)
    model = tiny(kind)
    seen = passed_through(engine, tiny_ids(), TokenLinear)
    assert set(seen) == {matrix.name for matrix in report.quantized}
    for matrix in report.quantized:
        x, y = seen[matrix.name]
        size = matrix.in_features if group_size == -1 else group_size
        weight, bias = weight_of(model, matrix), bias_of(model, matrix)
        expected = torch.from_numpy(integer_product(x, weight, bias, bits, size)).float()
        torch.testing.assert_close(y.flatten(0, -2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_near_the_original(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    expected = logits_of(model, tiny_ids())
    for bits, bound in ((8, 0.02), (4, 0.2)):
        _, engine = round_trip(zeroquant(bits), tiny(kind), tmp_path / str(bits))
        difference = engine.prefill(tiny_ids())[0] - expected
        assert 1e-4 < float(difference.norm() / expected.norm()) < bound


def test_activations_are_rounded_too(tmp_path: Path) -> None:
    """With weights that 8 bits hold exactly, what is left is the rounding of activations."""
    model = tiny("llama")
    with torch.no_grad():
        for matrix in zeroquant().select(model)[0]:
            weight = weight_of(model, matrix)
            levels = (weight * 100).round().clamp(-127, 127)
            levels[:, ::16] = 127
            weight.copy_(levels / 128)
    expected = logits_of(model, tiny_ids())
    _, engine = round_trip(zeroquant(), model, tmp_path)
    difference = (engine.prefill(tiny_ids())[0] - expected).abs().max()
    assert 1e-3 < float(difference) / float(expected.abs().max()) < 0.1


def test_smaller_groups_and_more_bits_err_less(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    matrix = zeroquant().select(model)[0][0]
    weight = weight_of(model, matrix)
    # One large weight a row: it spoils the scale of its group only.
    weight[:, 0] = 3.0
    x = torch.randn(1, 50, 32)
    exact = x[0].double() @ weight.T.double()
    errors = [
        float(np.square(integer_product(x, weight, None, bits, size) - exact.numpy()).sum())
        for bits, size in ((4, 32), (4, 16), (8, 32), (8, 16))
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_a_token_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    _, engine = round_trip(zeroquant(), tiny("llama"), tmp_path)
    ids = tiny_ids(1, 12)
    whole, _ = engine.prefill(ids)
    _, cache = engine.prefill(ids[:, :-1])
    step, _ = engine.decode(ids[:, -1:], cache)
    assert divergence(whole[:, -1:], step) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"scale_dtype": "float32"}, {"head": True}], ids=str
)
def test_stored_bits_are_the_bits_on_disk(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    method = zeroquant(4, 16, **options)
    report = method.quantize(tiny(kind), None, None, tmp_path)
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    assert report.stored_bits == sum(method.stored_bits(matrix) for matrix in report.quantized)
    found = method.select(meta_model(CONFIGS[kind]))
    assert found == (list(report.quantized), list(report.left_out))


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        zeroquant(4).quantize(tiny("llama"), None, None, tmp_path / folder)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_what_runs_and_what_is_missing_is_said(tmp_path: Path) -> None:
    report, engine = round_trip(zeroquant(4), tiny("mixtral"), tmp_path)
    uses = engine.kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    assert {use.kernel for use in uses} == {
        "INT8 per token, then quantbench::packed_linear in float32"
    }
    assert {(use.layer, use.execution) for use in uses} == {("TokenLinear", "dequantized")}
    assert sum(use.weights for use in uses) == sum(m.weights for m in report.quantized)
    assert "without the layer-by-layer distillation" in report.notes[0]
    stacks = [entry for entry in report.left_out if entry[2] == STACKED_EXPERTS]
    assert sum(weights for _, weights, _ in stacks) == 2 * 4 * 3 * 32 * 64


def test_a_tied_head_is_untied_and_said_so(tmp_path: Path) -> None:
    expected = logits_of(tiny("llama_tied"), tiny_ids())
    report, engine = round_trip(zeroquant(head=True), tiny("llama_tied"), tmp_path)
    assert "quantizing the head unties" in report.notes[1]
    assert divergence(expected, engine.prefill(tiny_ids())[0]) < 2e-2


def test_bfloat16_activations(tmp_path: Path) -> None:
    expected = logits_of(tiny("qwen2"), tiny_ids())
    machine = Machine(compute_dtype="bfloat16")
    _, engine = round_trip(zeroquant(), tiny("qwen2"), tmp_path, None, machine)
    seen = passed_through(engine, tiny_ids(), TokenLinear)
    assert {y.dtype for _, y in seen.values()} == {torch.bfloat16}
    assert divergence(expected, engine.prefill(tiny_ids())[0]) < 5e-2


def test_kept_matrices_and_padding(tmp_path: Path) -> None:
    method = zeroquant(4, 24, keep=["*.down_proj"], on_indivisible="pad")
    report, engine = round_trip(method, tiny("llama"), tmp_path)
    assert len(report.quantized) == 12
    assert "rows of 32 inputs are padded to 48" in report.notes[1]
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    x, y = passed_through(engine, tiny_ids(), TokenLinear)[report.quantized[0].name]
    weight = weight_of(tiny("llama"), report.quantized[0])
    padded = torch.nn.functional.pad(weight, (0, 16))
    expected = integer_product(torch.nn.functional.pad(x, (0, 16)), padded, None, 4, 24)
    torch.testing.assert_close(
        y.flatten(0, -2), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 3}, "8 or 4 bits, not 3; set bits=8 or bits=4"),
        ({"bits": 2}, "8 or 4 bits, not 2; set bits=8 or bits=4"),
        ({"group_size": 8}, "group_size is 8; it must be 16 to 1024 inputs, or -1"),
        ({"symmetric": 1}, "method.symmetric of zeroquant is 1"),
        ({"keep": "lm_head"}, "method.keep is 'lm_head'; it must be a list"),
        ({"on_indivisible": "skip"}, "on_indivisible is 'skip'"),
        ({"scale_dtype": "int8"}, "scale_dtype is 'int8'"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        zeroquant(**options)
    assert "\n" not in str(caught.value)


def test_widths_and_hardware_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a multiple of group_size 24"):
        zeroquant(4, 24).select(tiny("llama"))
    with pytest.raises(ConfigError, match="'float16' on a CPU"):
        zeroquant().check(Machine(compute_dtype="float16"))
    zeroquant().check(Machine(allow_fallback=False))


def test_the_yaml_holds_every_option_at_its_default() -> None:
    node = OmegaConf.load(CONF)
    axes = {"bits": 4, "group_size": 64, "on_indivisible": "pad"}
    config = OmegaConf.create({**axes, "method": node})
    assert instantiate(config.method) == zeroquant(4, 64, on_indivisible="pad")
    assert set(node) - {"_target_"} == {field.name for field in fields(ZeroQuant)}
