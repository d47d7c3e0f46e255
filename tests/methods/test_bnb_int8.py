"""bnb_int8: LLM.int8() through a checkpoint, its outliers, and what multiplies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.errors import ConfigError
from methods import bitsandbytes_engine, library
from methods.bnb_int8 import BnbInt8
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence, round_trip
from tests.methods.layer_checks import bits_on_disk
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
bnb = bitsandbytes_engine.library()
needs_integers = pytest.mark.skipif(
    not bitsandbytes_engine.has_integer_kernel(), reason="without AVX-512 it converts to float32"
)


def method(**options: Any) -> BnbInt8:
    return BnbInt8("bnb_int8", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("int8")
    method().quantize(tiny("qwen2"), None, None, into)
    return into


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "llama_tied", "mixtral"])
def test_round_trip(architecture: str, tmp_path: Path) -> None:
    """Biases, Conv1D, a tied head; and both paths of the same files."""
    model = tiny(architecture)
    expected = logits_of(model, tiny_ids())
    report, engine = round_trip(method(), model, tmp_path)
    assert 1e-8 < divergence(expected, engine.prefill(tiny_ids())[0]) < 2e-5
    plain = method().load_dequantized(tmp_path, Machine())
    compare_paths(engine, plain, tiny_ids(), method().path_tolerance)
    assert {use.name for use in engine.kernels()} == {one.name for one in report.quantized}
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    assert report.stored_bits == sum(method().stored_bits(one) for one in report.quantized)


def test_weights_are_rounded_as_the_paper_has_it(folder: Path) -> None:
    """A row's scale is its largest absolute value in float16; codes are round(127 w / scale)."""
    tensors = load_file(folder / "model.safetensors")
    for part in ("mlp.up_proj", "self_attn.k_proj"):
        name = f"model.layers.1.{part}"
        weight = tiny("qwen2").get_submodule(name).weight.detach().half().float()
        scale = weight.abs().amax(1)
        assert torch.equal(tensors[f"{name}.SCB"], scale)
        codes = (weight * (127 / scale[:, None])).round().to(torch.int8)
        assert torch.equal(tensors[f"{name}.weight"], codes)


def test_matrices_are_listed(folder: Path) -> None:
    found = bitsandbytes_engine.matrices(folder)
    shapes = [(one.out_features, one.in_features) for one in found]
    assert shapes[:3] == [(32, 64), (64, 32), (64, 32)]
    assert len(found) == 14
    assert bitsandbytes_engine.group_sizes(folder) == {-1}


def test_it_is_what_from_pretrained_loads(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    ours = method().load(folder, Machine())
    assert torch.equal(logits_of(theirs, tiny_ids()), ours.prefill(tiny_ids())[0])


def layer_with_outliers(threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (result, exact product of the stored weight, result without feature 5's outlier)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator) * 0.1
    x = torch.randn(6, 64, generator=generator)
    x[2, 5] = 60.0
    linear = bnb.nn.Linear8bitLt(
        64, 48, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    stored = bitsandbytes_engine.decode({"weight": linear.weight.CB, "SCB": linear.weight.SCB})
    linear.eval()
    with torch.no_grad():
        return linear(x), x @ stored.T, x


def test_outlier_features_are_multiplied_in_floating_point() -> None:
    """On a CPU too: the token with the outlier keeps the digits of its other features."""
    errors = {}
    for threshold in (6.0, 0.0):
        found, exact, _ = layer_with_outliers(threshold)
        errors[threshold] = float((found - exact)[2].square().mean().sqrt())
    assert errors[6.0] < errors[0.0] / 5


def test_threshold_reaches_the_artefact_and_the_layers(tmp_path: Path) -> None:
    logits = []
    for number, threshold in enumerate((0, 0.5)):
        into = tmp_path / str(number)
        report, engine = round_trip(method(threshold=threshold), tiny("gpt2"), into)
        config = json.loads((into / "config.json").read_text())["quantization_config"]
        assert config["llm_int8_threshold"] == threshold
        assert bool(report.notes) == bool(threshold)
        assert engine.couples_rows == bool(threshold)
        assert ("0.5 and more" in engine.kernels()[0].kernel) == bool(threshold)
        logits.append(engine.prefill(tiny_ids())[0])
    assert not torch.equal(*logits)


@needs_integers
def test_the_kernel_named_is_the_one_that_runs(folder: Path) -> None:
    engine = method().load(folder, Machine())
    uses = engine.kernels()
    assert {(use.layer, use.execution) for use in uses} == {("Linear8bitLt", "packed")}
    assert all("torch._int_mm" in use.kernel and "float16" in use.kernel for use in uses)
    with torch.profiler.profile() as profile:
        engine.prefill(tiny_ids())
    assert "aten::_int_mm" in [event.key for event in profile.key_averages()]


def test_without_avx512_it_says_that_it_converts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitsandbytes_engine, "has_integer_kernel", lambda: False)
    uses = method().load(folder, Machine()).kernels()
    assert {use.execution for use in uses} == {"dequantized"}
    assert all("to(float32) + torch.matmul" in use.kernel for use in uses)
    with pytest.raises(ConfigError, match="no AVX-512"):
        method().check(Machine(allow_fallback=False))


@pytest.mark.parametrize("part", ["SCB", "weight"])
def test_a_broken_weight_is_caught(folder: Path, part: str) -> None:
    engine: Any = method().load(folder, Machine())
    plain = method().load_dequantized(folder, Machine())
    for layer in engine.model.model.layers:
        state = layer.self_attn.o_proj.state
        if part == "SCB":
            state.SCB = state.SCB * 2
        else:
            state.CB = state.CB.roll(1, dims=0)
    with pytest.raises(PathDisagreementError, match="prefill"):
        compare_paths(engine, plain, tiny_ids(), method().path_tolerance)


def test_bfloat16_activations(folder: Path) -> None:
    engine: Any = method().load(folder, Machine(compute_dtype="bfloat16"))
    assert engine.model.model.norm.weight.dtype == torch.bfloat16
    expected = logits_of(tiny("qwen2"), tiny_ids())
    assert divergence(expected, engine.prefill(tiny_ids())[0]) < 1e-3


def test_same_input_same_files(folder: Path, tmp_path: Path) -> None:
    method().quantize(tiny("qwen2"), None, None, tmp_path)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_kept_matrices_and_stacks_of_experts_stay_float(tmp_path: Path) -> None:
    report, engine = round_trip(method(keep=["*.o_proj"]), tiny("mixtral"), tmp_path)
    assert len(report.quantized) == 2 * 3
    loaded: Any = engine
    assert type(loaded.model.model.layers[0].self_attn.o_proj).__name__ == "Linear"
    experts = [entry for entry in report.left_out if "stack of experts" in entry[2]]
    assert sum(weights for _, weights, _ in experts) == 2 * 4 * 3 * 32 * 64


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 1e5
    with pytest.raises(ConfigError, match=r"up_proj holds 1 values that are NaN or infinite"):
        method().quantize(model, None, None, tmp_path)


def test_without_the_library_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"pip install .* bitsandbytes"):
        method().quantize(tiny("gpt2"), None, None, tmp_path)


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"threshold": -1}, Machine(), r"threshold of bnb_int8 is -1; .* 0 \(no outlier"),
        ({"threshold": "6"}, Machine(), "threshold of bnb_int8 is '6'"),
        ({"threshold": float("nan")}, Machine(), "threshold of bnb_int8 is nan"),
        ({"keep": "a"}, Machine(), "method.keep is 'a'; it must be a list"),
        ({}, Machine(compute_dtype="float16"), "use 'float32' or 'bfloat16'"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_the_yaml_builds_the_method() -> None:
    built = instantiate(OmegaConf.load(CONF / "bnb_int8.yaml"))
    assert built == method()
    assert (built.bits, built.group_size, built.threshold) == (8.0, -1, 6.0)
