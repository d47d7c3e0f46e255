"""EETQ's numbers against the library's own loop, and both ways an artefact is loaded."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.load import meta_model
from kernels.errors import ConfigError
from methods import eetq as module
from methods.artefact import WEIGHTS
from methods.base import Method
from methods.eetq import Eetq, EetqLinear, StoredEetq, has_library, round_rows
from methods.layers import bias_of, weight_of
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence, round_trip
from tests.methods.layer_checks import bits_on_disk
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method" / "eetq.yaml"
KINDS = ("llama", "llama_tied", "qwen2", "gpt2", "mixtral", "opt")

needs_library = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_library()), reason="EETQ and a CUDA card are needed"
)


def eetq(**options: Any) -> Eetq:
    return Eetq("eetq", **options)


def plain(weight: Tensor) -> tuple[list[list[int]], list[float]]:
    """Return codes [out][in] and scales as the library's C++ has them: round half away from 0."""
    codes, scales = [], []
    for row in weight.tolist():
        scale = max(abs(value) for value in row) / 128
        quotients = [value / scale for value in row]
        rounded = [math.copysign(math.floor(abs(q) + 0.5), q) for q in quotients]
        codes.append([int(max(-128, min(127, q))) for q in rounded])
        scales.append(scale)
    return codes, scales


def test_it_is_a_method() -> None:
    method: Method = eetq()
    assert (method.name, method.bits, method.group_size) == ("eetq", 8, -1)
    assert not method.needs_calibration


def test_rows_are_rounded_as_the_library_does() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 65) * torch.logspace(-3, 2, 9)[:, None]
    codes, scales = round_rows(weight)
    expected, exact = plain(weight)
    assert codes.shape == (65, 9)
    assert codes.dtype == torch.int8
    assert codes.T.tolist() == expected
    assert torch.equal(scales, torch.tensor(exact).half())


def test_ties_go_away_from_zero_and_the_largest_is_clipped() -> None:
    # The scale is 1: what lies between two codes is a tie.
    weight = torch.tensor([[128.0, 2.5, -2.5, 0.5, -0.5, 3.5], [-128.0, 1.5, -1.5, 0, 0, 127.5]])
    codes, scales = round_rows(weight)
    assert scales.tolist() == [1, 1]
    assert codes.T.tolist() == [[127, 3, -3, 1, -1, 4], [-128, 2, -2, 0, 0, 127]]


def test_rows_of_zeros_stay_so() -> None:
    codes, scales = round_rows(torch.zeros(2, 4))
    assert not codes.any()
    assert torch.isfinite(scales).all()


@needs_library
def test_the_library_gives_the_same_integers() -> None:
    import EETQ

    weight = torch.randn(128, 256)
    codes, scales = round_rows(weight)
    plainly, _, found = EETQ.quant_weights(weight.T.contiguous(), torch.int8, True)
    assert torch.equal(plainly, codes)
    assert torch.equal(found.half(), scales)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loaded_artefact_is_the_rounded_model(kind: str, tmp_path: Path) -> None:
    method = eetq()
    report, engine = round_trip(method, tiny(kind), tmp_path)
    model = tiny(kind)
    original = logits_of(model, tiny_ids())
    for matrix in report.quantized:
        weight = weight_of(model, matrix)
        codes, scales = plain(weight)
        scale = torch.tensor(scales).half().float()
        weight.copy_(torch.tensor(codes).float() * scale[:, None])
    expected = logits_of(model, tiny_ids())
    logits, cache = engine.prefill(tiny_ids()[:, :-1])
    step, _ = engine.decode(tiny_ids()[:, -1:], cache)
    torch.testing.assert_close(torch.cat([logits, step], 1), expected, rtol=1e-4, atol=1e-4)
    assert 1e-9 < divergence(original, expected) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_artefact_holds_the_librarys_tensors(kind: str, tmp_path: Path) -> None:
    method = eetq()
    report = method.quantize(tiny(kind), None, None, tmp_path)
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    assert report.stored_bits == sum(method.stored_bits(matrix) for matrix in report.quantized)
    found = method.select(meta_model(CONFIGS[kind]))
    assert found == (list(report.quantized), list(report.left_out))
    tensors = load_file(tmp_path / WEIGHTS)
    for matrix in report.quantized:
        weight, scales = tensors[f"{matrix.name}.weight"], tensors[f"{matrix.name}.weight_scales"]
        assert (weight.dtype, scales.dtype) == (torch.int8, torch.float16)
        assert weight.shape == (matrix.in_features, matrix.out_features)
        assert scales.shape == (matrix.out_features,)


def test_what_is_simulated_is_said(tmp_path: Path) -> None:
    report, engine = round_trip(eetq(), tiny("mixtral"), tmp_path)
    uses = engine.kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    assert {(use.layer, use.execution) for use in uses} == {("Linear", "simulated")}
    assert uses[0].kernel.startswith("none: rounded weights as floats")
    assert "simulated in floating point" in report.notes[0]
    experts = [reason for name, _, reason in report.left_out if "experts" in name]
    assert experts == ["stack of experts: EETQ takes whole linear maps"] * 2


class Card(ModuleType):
    """The library as it would be on a card: bytes are interleaved, and its kernel reads them so."""

    def __init__(self) -> None:
        super().__init__("EETQ")

    @staticmethod
    def preprocess_weights(weight: Tensor, is_int4: bool) -> Tensor:
        assert weight.dtype == torch.int8
        assert weight.device.type == "cpu"
        assert not is_int4
        return weight.flip(0)

    @staticmethod
    def w8_a16_gemm(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        assert x.dtype == scales.dtype == torch.float16
        assert x.ndim == 2
        assert x.is_contiguous()
        return ((x.float() @ weight.flip(0).float()) * scales.float()).half()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_librarys_layer_is_given_what_it_takes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "EETQ", Card())
    model = tiny(kind)
    matrix = eetq().select(model)[0][0]
    bias = bias_of(model, matrix)
    stored = StoredEetq(*round_rows(weight_of(model, matrix)), bias)
    layer = EetqLinear(stored)
    x = torch.randn(2, 5, matrix.in_features).half().transpose(0, 1)
    y = layer(x)
    assert y.dtype == torch.float16
    expected = x.float() @ stored.dequantized(torch.float32).T
    expected = expected if bias is None else expected + bias
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


@needs_library
def test_the_kernel_gives_what_the_integers_say(tmp_path: Path) -> None:
    eetq().quantize(tiny("llama"), None, None, tmp_path)
    engine = eetq().load(tmp_path, Machine("cuda", "float16"))
    assert {use.execution for use in engine.kernels()} == {"packed"}
    expected = eetq().load(tmp_path, Machine()).prefill(tiny_ids())[0]
    logits = engine.prefill(tiny_ids())[0].cpu()
    assert float((logits - expected).norm() / expected.norm()) < 0.01


def test_bfloat16_activations(tmp_path: Path) -> None:
    machine = Machine(compute_dtype="bfloat16")
    _, engine = round_trip(eetq(), tiny("qwen2"), tmp_path, None, machine)
    loaded: Any = engine
    projection = loaded.model.model.layers[0].self_attn.q_proj
    assert isinstance(projection, nn.Linear)
    assert projection.weight.dtype == projection.bias.dtype == torch.bfloat16


def test_scales_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:3] *= 1e-7
    notes = eetq().quantize(model, None, None, tmp_path / "small").notes
    assert notes[1].startswith("3 rows are so small that float16 holds their scale as 0")
    with torch.no_grad():
        model = tiny("llama")
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e8
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up_proj: a scale of 7.812e\+05 is beyond"):
        eetq().quantize(model, None, None, tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        eetq().quantize(tiny("llama"), None, None, tmp_path / folder)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_hardware_that_cannot_run_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"needs CUDA.*set hardware.allow_fallback=true"):
        eetq().check(Machine(allow_fallback=False))
    with pytest.raises(ConfigError, match="'float16' on a CPU"):
        eetq().check(Machine(compute_dtype="float16"))
    monkeypatch.setattr(module, "has_library", lambda: False)
    eetq().check(Machine("cuda", "bfloat16"))
    monkeypatch.setattr(module, "has_library", lambda: True)
    with pytest.raises(ConfigError, match="computes in float16, not in bfloat16"):
        eetq().check(Machine("cuda", "bfloat16"))
    eetq().check(Machine("cuda", "float16", allow_fallback=False))


def test_bad_options_and_kept_matrices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it must be a list"):
        eetq(keep="lm_head")
    report = eetq(keep=["*.down_proj"]).quantize(tiny("llama"), None, None, tmp_path)
    assert len(report.quantized) == 12


def test_the_yaml_holds_every_option_at_its_default() -> None:
    node = OmegaConf.load(CONF)
    assert instantiate(node) == eetq()
    assert set(node) - {"_target_"} == {field.name for field in fields(Eetq)}
