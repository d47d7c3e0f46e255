"""torchao_int8: its weights against its formula, what kernels run, the way through a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from kernels.errors import ConfigError
from methods import library, torchao_int8
from methods.int8_static import has_integer_kernel
from methods.packed import PathDisagreementError, compare_paths
from methods.torchao_int8 import TorchaoInt8
from tests.architectures import tiny, tiny_ids
from tests.methods.int8_models import (
    divergence,
    gpt2,
    llama,
    logits_of,
    mixtral,
    round_trip,
    tokens,
)
from tests.methods.layer_checks import bits_on_disk
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
UP = "model.layers.0.mlp.up_proj"

needs_integer_kernel = pytest.mark.skipif(
    not has_integer_kernel(), reason="this processor has no VNNI"
)
BOTH = ["none", pytest.param("dynamic", marks=needs_integer_kernel)]


def method(activations: str = "none", **options: Any) -> TorchaoInt8:
    return TorchaoInt8("torchao_int8", activations, **options)


def ops(engine: Any, ids: Tensor) -> set[str]:
    """Return the names of the operations that run while `engine` reads `ids`."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        engine.prefill(ids)
    return {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("activations", BOTH)
def test_weights_are_rounded_by_half_of_the_range(activations: str, tmp_path: Path) -> None:
    model = llama()
    weight = model.get_submodule(UP).weight.detach().double()
    method(activations).quantize(model, None, None, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    torch.testing.assert_close(stored[f"{UP}._weight_scale"].double(), scale)
    steps = weight / scale
    wrong = stored[f"{UP}._weight_qdata"] != steps.round().clamp(-128, 127)
    # The largest weight of a row stands half-way between two steps: a last bit decides.
    assert bool((steps.abs()[wrong] - 127.5).abs().lt(1e-4).all())
    assert not stored[f"{UP}._weight_zero_point"].any()


@pytest.mark.parametrize("activations", BOTH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paths_agree_and_rows_say_what_runs(activations: str, dtype: str, tmp_path: Path) -> None:
    model = llama(bias=True)
    expected = logits_of(model, tokens())
    machine = Machine(compute_dtype=dtype)
    chosen = method(activations)
    report, engine = round_trip(chosen, model, tmp_path, machine=machine)
    plain = chosen.load_dequantized(tmp_path, machine)
    assert 1e-9 < divergence(expected, engine.prefill(tokens())[0]) < 2e-2
    found = compare_paths(engine, plain, tokens(), chosen.path_tolerance)
    assert found.prefill < (0.02 if dtype == "float32" else 0.1)
    kernel = "_int_mm" if activations == "dynamic" else f"weight to {dtype} + aten::mm"
    execution = "packed" if activations == "dynamic" else "dequantized"
    uses = engine.kernels()
    assert {use.name for use in uses} == {matrix.name for matrix in report.quantized}
    assert all(kernel in use.kernel and use.execution == execution for use in uses)
    assert sum(use.weights for use in uses) == sum(matrix.weights for matrix in report.quantized)
    seen = ops(engine, tokens())
    assert ("aten::_int_mm" in seen) == (activations == "dynamic")
    assert "aten::_int_mm" not in ops(plain, tokens())


def contents(folder: Path) -> dict[str, Any]:
    """Return what the file holds; the order of its metadata is drawn anew at each writing."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        facts: dict[str, Any] = dict(file.metadata())
    tensors = load_file(folder / "model.safetensors")
    return facts | {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("activations", BOTH)
def test_the_artefact_is_a_checkpoint_that_transformers_loads(
    activations: str, tmp_path: Path
) -> None:
    report, engine = round_trip(method(activations), llama(), tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32).eval()
    assert torch.equal(logits_of(model, tokens()), engine.prefill(tokens())[0])
    assert report.stored_bits == bits_on_disk(report, tmp_path / "one")
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".json", ".safetensors"}
    method(activations).quantize(llama(), None, None, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_both_activations_round_alike_but_run_otherwise(tmp_path: Path) -> None:
    for activations in ("none", "dynamic"):
        method(activations).quantize(llama(), None, None, tmp_path / activations)
    one, other = (load_file(tmp_path / a / "model.safetensors") for a in ("none", "dynamic"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    if has_integer_kernel():
        engines = [method(a).load(tmp_path / a, Machine()) for a in ("none", "dynamic")]
        first, second = (engine.prefill(tokens())[0] for engine in engines)
        assert not torch.equal(first, second)


def rolled(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}._weight_qdata"] = tensors[f"{UP}._weight_qdata"].roll(1, 0)


def scaled(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}._weight_scale"] *= 3


@pytest.mark.parametrize("activations", BOTH)
@pytest.mark.parametrize("damage", [rolled, scaled])
def test_weights_that_are_not_the_stored_ones_are_caught(
    damage: Callable[[dict[str, Tensor]], None], activations: str, tmp_path: Path
) -> None:
    chosen = method(activations)
    _, engine = round_trip(chosen, llama(), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata)
    plain = chosen.load_dequantized(tmp_path, Machine())
    with pytest.raises(PathDisagreementError, match="differ by"):
        compare_paths(engine, plain, tokens(), chosen.path_tolerance)


@pytest.mark.parametrize("activations", BOTH)
@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "gpt_neox", "opt"])
def test_architectures(kind: str, activations: str, tmp_path: Path) -> None:
    model = tiny(kind)
    expected = logits_of(model, tiny_ids())
    report, engine = round_trip(method(activations), model, tmp_path)
    loaded: Any = engine
    assert divergence(expected, engine.prefill(tiny_ids())[0]) < 0.1
    tied = loaded.model.lm_head if hasattr(loaded.model, "lm_head") else loaded.model.embed_out
    if kind != "gpt_neox":
        assert tied.weight is loaded.model.get_input_embeddings().weight
    assert report.stored_bits == bits_on_disk(report, tmp_path)


def test_a_tied_head_is_stored_apart_and_said(tmp_path: Path) -> None:
    model = llama(tied=True)
    expected = logits_of(model, tokens())
    report, engine = round_trip(method(head=True), model, tmp_path)
    assert "stored apart" in report.notes[0]
    assert "lm_head" in {use.name for use in engine.kernels()}
    assert divergence(expected, engine.prefill(tokens())[0]) < 5e-3
    assert report.stored_bits == bits_on_disk(report, tmp_path)


def test_kept_matrices_stay_float(tmp_path: Path) -> None:
    _, engine = round_trip(method(keep=["*.1.mlp.down_proj"]), llama(), tmp_path)
    loaded: Any = engine
    kept = loaded.model.model.layers[1].mlp.down_proj
    assert type(kept.weight) is nn.Parameter
    assert len(engine.kernels()) == 13


def test_what_has_no_form() -> None:
    with pytest.raises(ConfigError, match=r"c_attn is a transposed Conv1D.*method=int8_dynamic"):
        method().select(gpt2())
    matrices, left_out = method().select(mixtral())
    assert all(matrix.count == 1 for matrix in matrices)
    experts = [weights for _, weights, reason in left_out if "stack of experts" in reason]
    assert sum(experts) == 4 * 3 * 32 * 64


def test_mixtral_with_float_experts(tmp_path: Path) -> None:
    model = mixtral()
    expected = logits_of(model, tokens())
    _, engine = round_trip(method(), model, tmp_path)
    assert divergence(expected, engine.prefill(tokens())[0]) < 1e-3


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"activations": "static"}, Machine(), "'static'; it must be one of none, dynamic"),
        ({"head": 1}, Machine(), "method.head of torchao_int8 is 1; it must be true or false"),
        ({"keep": "*"}, Machine(), r"method.keep is '\*'; it must be a list"),
        ({}, Machine(compute_dtype="float16"), "float32 or bfloat16 on cpu, not in float16"),
    ],
)
def test_refusals_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_without_vnni_dynamic_activations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao_int8, "has_integer_kernel", lambda: False)
    with pytest.raises(ConfigError, match="no VNNI"):
        method("dynamic").check(Machine())
    method("none").check(Machine())


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    method().check(Machine())
    with pytest.raises(ConfigError, match=r"needs the package torchao.*pip install"):
        method().quantize(llama(), None, None, tmp_path)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_submodule(UP).weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=f"weight {UP} holds 1 values"):
        method().quantize(model, None, None, tmp_path)


def test_the_yaml_builds_the_method() -> None:
    built = instantiate(OmegaConf.load(CONF / "torchao_int8.yaml"))
    assert built == method()
    assert (built.bits, built.group_size) == (8, -1)
