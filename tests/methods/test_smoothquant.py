"""smoothquant: the same float function, the paper's scales, less error where outliers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kernels.errors import ConfigError
from methods.compressed_oneshot import OneShot
from methods.packed import compare_paths
from methods.smoothquant import SmoothQuant
from methods.w8a8 import W8A8Static
from tests.architectures import CONFIGS, logits_of, tiny, tiny_ids
from tests.methods.compressed_models import (
    CALIBRATION,
    INT8_EXECUTION,
    calibration_text,
    difference,
    half,
    tensors_of,
)
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"

SAME_FUNCTION = 1e-4
OUTLIERS = (3, 17)


def method(**options: Any) -> SmoothQuant:
    return SmoothQuant("smoothquant", calibration=CALIBRATION, **options)


def smoothed(model: Any, alpha: float) -> Any:
    run = OneShot("smoothquant", model, None, calibration_text())
    with run.session():
        run.smooth(alpha)
    return model


def with_outliers() -> Any:
    """Return a model two of whose channels are 60 times as large behind every norm."""
    model = half("llama")
    with torch.no_grad():
        for block in model.model.layers:
            for norm, maps in (
                (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (block.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight[list(OUTLIERS)] *= 60
                for name in maps:
                    owner = block.self_attn if name in ("q_proj", "k_proj", "v_proj") else block.mlp
                    getattr(owner, name).weight[:, list(OUTLIERS)] /= 60
    return model


@torch.no_grad()
def outputs_of(model: Any, name: str) -> Tensor:
    """Return [tokens, hidden] of what module `name` gives on the calibration text."""
    seen: list[Tensor] = []
    module: nn.Module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, output: seen.append(output.flatten(0, 1)))
    for sample in calibration_text():
        model(input_ids=sample[None], use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_smoothed_float_model_is_the_same_function(kind: str, alpha: float) -> None:
    expected = logits_of(tiny(kind), tiny_ids())
    model = smoothed(tiny(kind), alpha)
    found = logits_of(model, tiny_ids())
    assert float((found - expected).abs().max()) < SAME_FUNCTION
    before = tiny(kind).model.layers[0].input_layernorm.weight
    assert difference(model.model.layers[0].input_layernorm.weight, before) > 0.1


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_scales_are_those_of_the_paper_with_ranges_for_maxima(alpha: float) -> None:
    """s = max|X|^alpha / max|W|^(1 - alpha); the library reads 2 max|X| as max X - min X."""
    original = tiny("llama")
    model = smoothed(tiny("llama"), alpha)
    for norm, maps in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        name = f"model.layers.1.{norm}"
        x = outputs_of(original, name)
        weights = [original.get_submodule(f"model.layers.1.{m}").weight.detach() for m in maps]
        largest = torch.cat(weights).abs().amax(0)
        s = (x.amax(0) - x.amin(0)) ** alpha / (2 * largest) ** (1 - alpha)
        before, after = original.get_submodule(name).weight, model.get_submodule(name).weight
        torch.testing.assert_close(after, before / s)
        for own, weight in zip(maps, weights, strict=True):
            torch.testing.assert_close(
                model.get_submodule(f"model.layers.1.{own}").weight, weight * s
            )
        paper = x.abs().amax(0) ** alpha / largest ** (1 - alpha)
        # A range is one to two times the largest magnitude, which the power brings nearer.
        ratio = s / paper / 2 ** (2 * alpha - 1)
        assert float(ratio.min()) >= 2**-alpha - 1e-5
        assert float(ratio.max()) <= 1 + 1e-5


def test_smoothing_lowers_the_error_where_there_are_outliers(tmp_path: Path) -> None:
    expected = logits_of(with_outliers(), tiny_ids())
    losses = {}
    plain = W8A8Static("w8a8_static", calibration=CALIBRATION)
    for name, chosen in {"plain": plain, "smoothed": method()}.items():
        chosen.quantize(with_outliers(), None, calibration_text(), tmp_path / name)
        engine = chosen.load(tmp_path / name, Machine())
        losses[name] = divergence(expected, engine.prefill(tiny_ids())[0])
    assert losses["smoothed"] < 0.2 * losses["plain"]


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_round_trip(activations: Any, tmp_path: Path) -> None:
    expected = logits_of(half("qwen2"), tiny_ids())
    chosen = method(activations=activations)
    report = chosen.quantize(half("qwen2"), None, calibration_text(), tmp_path)
    tensors = tensors_of(tmp_path)
    fixed = [name for name in tensors if name.endswith("input_scale")]
    assert len(fixed) == (14 if activations == "static" else 0)
    assert report.stored_bits == sum(
        8 * tensor.nbytes
        for name, tensor in tensors.items()
        if "proj." in name and not name.endswith("bias")
    )
    engine, other = chosen.load(tmp_path, Machine()), chosen.load_dequantized(tmp_path, Machine())
    assert {use.execution for use in engine.kernels()} == {INT8_EXECUTION}
    compare_paths(engine, other, tiny_ids(), 0.02)
    assert 1e-8 < divergence(expected, engine.prefill(tiny_ids())[0]) < 1e-3


def test_static_scales_are_those_of_the_smoothed_model(tmp_path: Path) -> None:
    model = half("llama")
    model.config.dtype = torch.float32
    method().quantize(model, None, calibration_text(), tmp_path)
    x = outputs_of(smoothed(half("llama"), 0.5), "model.layers.1.input_layernorm")
    scale = tensors_of(tmp_path)["model.layers.1.self_attn.q_proj.input_scale"]
    torch.testing.assert_close(scale, x.abs().max()[None] / 127.5)


def test_alpha_has_an_effect(tmp_path: Path) -> None:
    for alpha in (0.5, 0.8):
        folder = tmp_path / str(alpha)
        method(alpha=alpha).quantize(half("llama"), None, calibration_text(), folder)
    one, other = (tensors_of(tmp_path / str(alpha)) for alpha in (0.5, 0.8))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])


def fresh(kind: str) -> Any:
    config = CONFIG_MAPPING[kind].from_dict({**CONFIGS["llama"], "model_type": kind})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: tiny("opt"), "does not know which norms .* OPTForCausalLM"),
        (lambda: tiny("gpt_neox"), "does not know which norms .* GPTNeoXForCausalLM"),
        (lambda: tiny("gpt2"), "transposed Conv1D"),
        (lambda: tiny("mixtral"), "stack of experts"),
        (lambda: fresh("olmo"), "does not know which norms .* OlmoForCausalLM"),
        # Attention and MLP side by side behind one norm: Llama's mappings do not fit.
        (lambda: fresh("phi"), "takes the wrong norms .* PhiForCausalLM"),
    ],
)
def test_models_it_cannot_smooth_are_refused(build: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method().quantize(build(), None, calibration_text(), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 1.5}, "method.alpha is 1.5; it must be 0 to 1"),
        ({"alpha": True}, "method.alpha is True; it must be 0 to 1"),
        ({"activations": "none"}, "method.activations is 'none'; smoothquant has static"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        method(**options)


def test_it_needs_calibration_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smoothquant needs calibration text"):
        method().quantize(tiny("llama"), None, None, tmp_path)


def test_the_yaml_builds_the_method() -> None:
    node = OmegaConf.merge({"seed": 7}, {"method": OmegaConf.load(CONF / "smoothquant.yaml")})
    built = instantiate(node.method)
    assert built == SmoothQuant("smoothquant", calibration=built.calibration)
    assert (built.calibration.seed, built.bits, built.group_size) == (7, 8, -1)
