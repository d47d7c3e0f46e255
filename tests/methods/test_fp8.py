"""fp8, fp8_static, E4M3 and E5M2: values against PyTorch's casts, the way through a folder."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kernels.errors import ConfigError
from methods.base import QuantizeReport
from methods.compressed_layers import Fp8Linear
from methods.fp8 import Fp8, Fp8Static
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.compressed_models import (
    CALIBRATION,
    by_row,
    calibration_text,
    difference,
    fp8,
    half,
    largest_inputs,
    plain_logits,
    tensors_of,
)
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

EXACT = 1e-5
TIPPED = 0.02
"""A last bit of the sums before tips a rounding now and then."""

Made = tuple[Fp8 | Fp8Static, str, Path, QuantizeReport]


def method(format: Any, activations: Any) -> Fp8 | Fp8Static:
    if activations == "static":
        return Fp8Static("fp8_static", format=format, calibration=CALIBRATION)
    return Fp8("fp8", format=format, activations=activations)


@pytest.fixture(
    scope="module",
    params=list(itertools.product(TYPES, ("none", "dynamic", "static"))),
    ids=lambda pair: "-".join(pair),
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("fp8")
    chosen = method(*request.param)
    report = chosen.quantize(half("qwen2"), None, calibration_text(), folder)
    return chosen, request.param[1], folder, report


def test_weights_and_scales_are_those_of_pytorchs_cast(made: Made) -> None:
    chosen, activations, folder, report = made
    dtype = TYPES[chosen.format]
    end = torch.finfo(dtype).max
    tensors, model = tensors_of(folder), half("qwen2")
    names = [matrix.name for matrix in report.quantized]
    largest = largest_inputs(model, names)
    scale_name = "weight_scale" if chosen.format == "e4m3" else "scale"
    assert len(names) == 14
    for name in names:
        weight = model.get_submodule(name).weight
        scale = by_row(weight) / end
        assert torch.equal(tensors[f"{name}.{scale_name}"].reshape(-1, 1), scale)
        stored = tensors[f"{name}.weight"]
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), (weight / scale).to(dtype).float())
        fixed = tensors.get(f"{name}.input_scale")
        if activations == "static":
            torch.testing.assert_close(fixed, largest[name][None] / end)
        else:
            assert fixed is None


def test_reloaded_logits_are_those_of_a_plain_computation(made: Made) -> None:
    """Activation rounding survives the reload, in both paths."""
    chosen, activations, folder, report = made
    names = [matrix.name for matrix in report.quantized]
    rounded = partial(fp8, dtype=TYPES[chosen.format])
    largest = largest_inputs(half("qwen2"), names)
    inputs: Any = {
        "none": None,
        "dynamic": {name: lambda x: rounded(x, by_row(x)) for name in names},
        "static": {name: partial(rounded, largest=largest[name]) for name in names},
    }[activations]
    matrices = report.quantized
    both = plain_logits(half("qwen2"), matrices, lambda w: rounded(w, by_row(w)), inputs)
    only = plain_logits(half("qwen2"), matrices, lambda w: rounded(w, by_row(w)), None)
    for load in (chosen.load, chosen.load_dequantized):
        found, _ = load(folder, Machine()).prefill(tiny_ids())
        assert difference(found, both) < (EXACT if activations == "none" else TIPPED / 2)
        if activations != "none":
            assert difference(found, only) > 2 * difference(found, both)
            assert difference(found, only) > TIPPED / 2


def test_both_paths_agree_and_a_broken_weight_is_caught(made: Made) -> None:
    chosen, _, folder, _ = made
    engine: Any = chosen.load(folder, Machine())
    other = chosen.load_dequantized(folder, Machine())
    compare_paths(engine, other, tiny_ids(), TIPPED)
    bfloat16 = chosen.load(folder, Machine(compute_dtype="bfloat16"))
    compare_paths(bfloat16, other, tiny_ids(), chosen.path_tolerance)
    layer = engine.model.model.layers[0].self_attn.o_proj
    layer.weight = layer.weight.view(torch.uint8).roll(1, 0).view(layer.weight.dtype)
    with pytest.raises(PathDisagreementError):
        compare_paths(engine, other, tiny_ids(), chosen.path_tolerance)


def test_provenance_says_that_weights_are_converted(made: Made) -> None:
    chosen, activations, folder, report = made
    uses = chosen.load(folder, Machine()).kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    assert {(use.layer, use.execution) for use in uses} == {("Fp8Linear", "dequantized")}
    kind = str(TYPES[chosen.format]).removeprefix("torch.")
    own = {"none": "float32", "dynamic": f"{kind}, per token", "static": f"{kind}, fixed scale"}
    expected = f"{kind} to float32 + aten::linear (activations {own[activations]})"
    assert {use.kernel for use in uses} == {expected}
    plain = chosen.load_dequantized(folder, Machine()).kernels()
    assert {(use.layer, use.execution) for use in plain} == {("Linear", "simulated")}


def test_stored_bits_are_the_bits_on_disk(made: Made) -> None:
    chosen, _, folder, report = made
    sizes = {name: 8 * tensor.nbytes for name, tensor in tensors_of(folder).items()}
    for matrix in report.quantized:
        stored = {n: size for n, size in sizes.items() if n.startswith(f"{matrix.name}.")}
        stored.pop(f"{matrix.name}.bias", None)
        assert chosen.stored_bits(matrix) == sum(stored.values())
    assert report.stored_bits == sum(chosen.stored_bits(matrix) for matrix in report.quantized)


def test_the_rest_is_stored_in_the_checkpoints_type_and_tied(made: Made) -> None:
    chosen, _, folder, _ = made
    tensors = tensors_of(folder)
    assert tensors["model.norm.weight"].dtype == torch.float16
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == torch.float16
    assert "lm_head.weight" not in tensors
    engine: Any = chosen.load(folder, Machine())
    assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight


def test_the_same_inputs_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    chosen, _, folder, _ = made
    chosen.quantize(half("qwen2"), None, calibration_text(), tmp_path)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_scaled_mm_computes_the_same(made: Made) -> None:
    """The call that a card gets, on the CPU's slow version of it."""
    chosen, activations, folder, _ = made
    if chosen.format == "e5m2" or activations == "none":
        engine = chosen.load(folder, Machine())
        assert all(use.execution == "dequantized" for use in engine.kernels())
        return
    engine: Any = chosen.load(folder, Machine())
    layer: Fp8Linear = engine.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    layer.packed = True
    found = layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert layer.use("x").kernel.startswith("aten::_scaled_mm")
    assert layer.use("x").execution == "packed"


def test_e5m2_rounds_more_coarsely_than_e4m3(tmp_path: Path) -> None:
    expected = logits_of(half("llama_tied"), tiny_ids())
    errors = {}
    for name in TYPES:
        chosen = method(name, "none")
        chosen.quantize(half("llama_tied"), None, None, tmp_path / name)
        found, _ = chosen.load(tmp_path / name, Machine()).prefill(tiny_ids())
        errors[name] = difference(found, expected)
    assert 0.005 < errors["e4m3"] < errors["e5m2"] / 1.5 < 0.1


@pytest.mark.parametrize(("kind", "sentence"), [("gpt2", "Conv1D"), ("mixtral", "experts")])
@pytest.mark.parametrize("name", TYPES)
def test_models_without_a_form_are_refused(
    name: str, kind: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        method(name, "dynamic").quantize(tiny(kind), None, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_static_needs_calibration_text(tmp_path: Path) -> None:
    for name in TYPES:
        assert not method(name, "dynamic").needs_calibration
        with pytest.raises(ConfigError, match="fp8_static needs calibration text"):
            method(name, "static").quantize(tiny("llama"), None, None, tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "e3m4"}, "method.format is 'e3m4'; it must be one of e4m3, e5m2"),
        ({"activations": "static"}, "static ones calibrate: method=fp8_static"),
        ({"keep": "*.down_proj"}, "must be a list"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Fp8("fp8", **options)


def test_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set hardware\.compute_dtype=float32"):
        method("e4m3", "none").check(Machine(compute_dtype="float16"))


def test_the_yaml_builds_the_methods() -> None:
    for name, kind in (("fp8", Fp8), ("fp8_static", Fp8Static)):
        node = OmegaConf.merge({"seed": 7}, {"method": OmegaConf.load(CONF / f"{name}.yaml")})
        built = instantiate(node.method)
        assert type(built) is kind
        assert (built.name, built.format, built.bits, built.group_size) == (name, "e4m3", 8, -1)
        assert ("calibration" in node.method) == built.needs_calibration
