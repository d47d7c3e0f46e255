"""w8a8, w8a8_static: scales and integers against plain arithmetic, and the way through a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from kernels.errors import ConfigError
from methods import compressed_layers, library
from methods.base import QuantizeReport
from methods.compressed_layers import Int8Linear
from methods.int8_static import has_integer_kernel
from methods.packed import PathDisagreementError, compare_paths
from methods.w8a8 import W8A8, W8A8Static
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.compressed_models import (
    CALIBRATION,
    INT8_EXECUTION,
    by_row,
    calibration_text,
    difference,
    half,
    largest_inputs,
    plain_logits,
    symmetric_int8,
    tensors_of,
)
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
DYNAMIC, STATIC = W8A8("w8a8"), W8A8Static("w8a8_static", calibration=CALIBRATION)

Made = tuple[W8A8 | W8A8Static, Path, QuantizeReport]

EXACT = 1e-5
"""The same rounded values multiplied in another order."""
TIPPED = 0.02
"""A token's largest value lies on the tie at 127.5: a last bit decides for 127 or -128."""
TIPPED_PLAIN = 0.003
"""The same, between two computations on few tokens."""


@pytest.fixture(scope="module", params=[DYNAMIC, STATIC], ids=lambda method: method.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param.name)
    report = request.param.quantize(half("llama_tied"), None, calibration_text(), folder)
    return request.param, folder, report


def inputs_of(method: Any, report: QuantizeReport) -> dict[str, Any]:
    """Return how each matrix rounds its input, from the float model."""
    names = [matrix.name for matrix in report.quantized]
    if isinstance(method, W8A8):
        return {name: lambda x: symmetric_int8(x, by_row(x)) for name in names}
    largest = largest_inputs(half("llama_tied"), names)
    return {name: partial(symmetric_int8, largest=largest[name]) for name in names}


def test_weights_and_scales_are_those_of_the_formula(made: Made) -> None:
    method, folder, report = made
    tensors, model = tensors_of(folder), half("llama_tied")
    largest = largest_inputs(model, [matrix.name for matrix in report.quantized])
    assert len(report.quantized) == 14
    for matrix in report.quantized:
        weight = model.get_submodule(matrix.name).weight
        scale = by_row(weight) / 127.5
        codes = (weight / scale).round().clamp(-128, 127)
        assert torch.equal(tensors[f"{matrix.name}.weight"], codes.to(torch.int8))
        assert torch.equal(tensors[f"{matrix.name}.weight_scale"], scale)
        fixed = tensors.get(f"{matrix.name}.input_scale")
        if isinstance(method, W8A8):
            assert fixed is None
        else:
            torch.testing.assert_close(fixed, largest[matrix.name][None] / 127.5)


def test_reloaded_logits_are_those_of_a_plain_computation(made: Made) -> None:
    """Activation rounding survives the reload, in both paths."""
    method, folder, report = made
    inputs = inputs_of(method, report)
    model = half("llama_tied")
    only = plain_logits(model, report.quantized, lambda w: symmetric_int8(w, by_row(w)), None)
    model = half("llama_tied")
    both = plain_logits(model, report.quantized, lambda w: symmetric_int8(w, by_row(w)), inputs)
    tolerance = TIPPED_PLAIN if isinstance(method, W8A8) else EXACT
    for load in (method.load, method.load_dequantized):
        found, _ = load(folder, Machine()).prefill(tiny_ids())
        assert difference(found, both) < tolerance
        assert difference(found, only) > 2 * tolerance


def test_packed_and_library_paths_agree(made: Made) -> None:
    method, folder, _ = made
    engine, other = method.load(folder, Machine()), method.load_dequantized(folder, Machine())
    compare_paths(engine, other, tiny_ids(), TIPPED)
    bfloat16 = method.load(folder, Machine(compute_dtype="bfloat16"))
    compare_paths(bfloat16, other, tiny_ids(), method.path_tolerance)


@pytest.mark.parametrize(
    ("part", "change"), [("weight", lambda w: w.roll(1, 0)), ("scale", lambda s: 2 * s)]
)
def test_a_broken_weight_is_caught(
    made: Made, part: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    method, folder, _ = made
    engine: Any = method.load(folder, Machine())
    layer = engine.model.model.layers[0].self_attn.o_proj
    setattr(layer, part, change(getattr(layer, part)))
    other = method.load_dequantized(folder, Machine())
    with pytest.raises(PathDisagreementError):
        compare_paths(engine, other, tiny_ids(), method.path_tolerance)


def test_provenance_names_what_runs(made: Made) -> None:
    method, folder, report = made
    uses = method.load(folder, Machine()).kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    assert {use.layer for use in uses} == {"Int8Linear"}
    assert all(("aten::_int_mm" in use.kernel) == has_integer_kernel() for use in uses)
    assert {use.execution for use in uses} == {INT8_EXECUTION}
    assert sum(use.weights for use in uses) == sum(m.weights for m in report.quantized)
    plain = method.load_dequantized(folder, Machine()).kernels()
    assert {(use.layer, use.execution) for use in plain} == {("Linear", "simulated")}
    assert all("rounded to 8 bits" in use.kernel for use in plain)


@pytest.mark.skipif(not has_integer_kernel(), reason="this processor has no VNNI")
def test_onednn_runs_the_product(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    method, folder, _ = made
    engine = method.load(folder, Machine())
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        engine.prefill(tiny_ids())
    log = [line for line in capfd.readouterr().out.splitlines() if "src_s8" in line]
    assert len(log) == 14
    assert all("wei_s8" in line and "dst_s32" in line for line in log)


def test_stored_bits_are_the_bits_on_disk(made: Made) -> None:
    method, folder, report = made
    sizes = {name: 8 * tensor.nbytes for name, tensor in tensors_of(folder).items()}
    for matrix in report.quantized:
        stored = sum(size for name, size in sizes.items() if name.startswith(f"{matrix.name}."))
        assert method.stored_bits(matrix) == stored
    assert report.stored_bits == sum(method.stored_bits(matrix) for matrix in report.quantized)


def test_the_rest_is_stored_in_the_checkpoints_type_and_tied(made: Made) -> None:
    method, folder, _ = made
    tensors = tensors_of(folder)
    assert tensors["model.norm.weight"].dtype == torch.float16
    assert "lm_head.weight" not in tensors
    engine: Any = method.load(folder, Machine())
    assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_the_same_inputs_give_the_same_bytes_and_nothing_in_the_working_folder(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, folder, _ = made
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    method.quantize(half("llama_tied"), None, calibration_text(), tmp_path / "again")
    assert not list((tmp_path / "cwd").iterdir())
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_token_does_not_depend_on_its_neighbours(made: Made) -> None:
    method, folder, _ = made
    engine = method.load(folder, Machine())
    whole, _ = engine.prefill(tiny_ids(1, 12))
    _, cache = engine.prefill(tiny_ids(1, 12)[:, :-1])
    step, _ = engine.decode(tiny_ids(1, 12)[:, -1:], cache)
    assert difference(step, whole[:, -1:]) < TIPPED


@pytest.mark.parametrize("kind", ["qwen2", "opt", "gpt_neox"])
def test_biases_and_other_architectures(kind: str, tmp_path: Path) -> None:
    """OPT's MLP gets flat tokens; GPT-NeoX's head is renamed while loading."""
    model = half(kind)
    expected = logits_of(model, tiny_ids())
    DYNAMIC.quantize(model, None, None, tmp_path)
    engine, other = DYNAMIC.load(tmp_path, Machine()), DYNAMIC.load_dequantized(tmp_path, Machine())
    compare_paths(engine, other, tiny_ids(), TIPPED)
    assert 1e-6 < difference(engine.prefill(tiny_ids())[0], expected) < 0.03


def test_kept_matrices_stay_float(tmp_path: Path) -> None:
    method = W8A8("w8a8", keep=["*.down_proj"])
    report = method.quantize(half("llama"), None, None, tmp_path)
    assert len(report.quantized) == 12
    engine: Any = method.load(tmp_path, Machine())
    assert type(engine.model.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(engine.model.model.layers[0].mlp.up_proj, Int8Linear)
    assert {use.execution for use in engine.kernels()} == {INT8_EXECUTION}


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("gpt2", "c_attn is a transposed Conv1D"), ("mixtral", "is a stack of experts")],
)
def test_models_the_format_has_no_form_for(kind: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DYNAMIC.quantize(tiny(kind), None, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_static_needs_calibration_text(tmp_path: Path) -> None:
    assert not DYNAMIC.needs_calibration
    with pytest.raises(ConfigError, match="w8a8_static needs calibration text"):
        STATIC.quantize(tiny("llama"), None, None, tmp_path)


def test_a_layer_that_the_library_skips_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("methods.compressed_oneshot.quantized_modules", lambda model: ["lm_head"])
    with pytest.raises(RuntimeError, match=r"skipped 14 .* added 1"):
        DYNAMIC.quantize(half("llama"), None, None, tmp_path)


def test_without_vnni_it_dequantizes_and_says_so(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, folder, _ = made
    expected, _ = method.load(folder, Machine()).prefill(tiny_ids())
    monkeypatch.setattr(compressed_layers, "has_integer_kernel", lambda: False)
    engine = method.load(folder, Machine(allow_fallback=True))
    assert {use.execution for use in engine.kernels()} == {"dequantized"}
    assert torch.equal(engine.prefill(tiny_ids())[0], expected)
    with pytest.raises(ConfigError, match="no VNNI"):
        method.check(Machine(allow_fallback=False))


@pytest.mark.parametrize(
    ("build", "machine", "sentence"),
    [
        (lambda: W8A8("w8a8", keep="*.down_proj"), Machine(), "must be a list"),
        (lambda: DYNAMIC, Machine(compute_dtype="float16"), "set hardware.compute_dtype=float32"),
        (lambda: DYNAMIC, Machine(device="mps"), "runs on cpu and cuda, not on mps"),
    ],
)
def test_bad_options_are_one_sentence(
    build: Callable[[], W8A8], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        build().check(machine)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"w8a8 needs the package llmcompressor.*pip install"):
        DYNAMIC.quantize(half("llama"), None, None, tmp_path)


def test_the_yaml_builds_the_methods() -> None:
    for name, expected in (("w8a8", DYNAMIC), ("w8a8_static", STATIC)):
        node = OmegaConf.merge({"seed": 7}, {"method": OmegaConf.load(CONF / f"{name}.yaml")})
        built = instantiate(node.method)
        assert type(built) is type(expected)
        assert (built.name, built.bits, built.group_size) == (name, 8, -1)
        assert ("calibration" in node.method) == built.needs_calibration
