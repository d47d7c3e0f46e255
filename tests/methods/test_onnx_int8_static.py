"""onnx_int8_static: calibrated ranges against the model's own values, and the way through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

pytest.importorskip("onnxruntime")

from kernels.errors import ConfigError
from methods import onnx_int8_static
from methods.base import Calibration
from methods.onnx_graph import read, tensors_of
from methods.onnx_int8 import Grid
from methods.onnx_int8_static import OnnxInt8Static, activation_grids
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine
from tests.methods.onnx_models import bits_on_disk, change_tensor, quantize, small

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
CALIBRATION = Calibration(samples=4, seq_len=40, seed=0)
DOWN = "model.layers.1.mlp.down_proj"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"symmetric": True},
    {"per_channel": False},
    {"reduce_range": True},
    {"head": True},
    {"keep": ["*.down_proj"]},
    {"round_outputs": True},
    {"round_outputs": True, "format": "qoperator"},
    {"calibrator": "entropy"},
    {"calibrator": "percentile"},
]


def method(**options: Any) -> OnnxInt8Static:
    return OnnxInt8Static("onnx_int8_static", CALIBRATION, **options)


def text() -> Tensor:
    return tiny_ids(4, 40)


def grids_of(folder: Path) -> dict[str, tuple[Grid, Grid | None]]:
    graph = read(folder)
    return activation_grids(graph.graph, tensors_of(graph))


def values_of(name: str) -> tuple[Tensor, Tensor]:
    """Return all inputs and all products (before the bias) of a map of qwen2 on the text."""
    model = small("qwen2")
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module: Any, inputs: Any, output: Tensor) -> None:
        bias = 0 if module.bias is None else module.bias
        seen.append((inputs[0].detach(), (output - bias).detach()))

    model.get_submodule(name).register_forward_hook(watch)
    logits_of(model, text())
    return seen[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_round_trip(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Biases, Conv1D, a tied head; both paths of the same file; sizes to the bit."""
    if kind == "gpt2" and "keep" in options:
        options = {"keep": ["*.c_fc"]}
    chosen = method(**options)
    report = quantize(chosen, kind, tmp_path, text())
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    engine = chosen.load(tmp_path, Machine(allow_fallback=False))
    expected = logits_of(small(kind), tiny_ids())
    assert 1e-8 < divergence(expected, engine.prefill(tiny_ids())[0]) < 3e-4
    plain = chosen.load_dequantized(tmp_path, Machine())
    compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)
    uses = engine.kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    assert {use.execution for use in uses} == {"packed"}
    operator = "QLinearMatMul" if chosen.round_outputs else "MatMulIntegerToFloat"
    assert all(f"onnxruntime {operator}, 8-bit integers" in use.kernel for use in uses)
    assert ("ranges and outputs" in uses[0].kernel) == chosen.round_outputs


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", DOWN])
def test_min_max_ranges_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    quantize(method(round_outputs=True), "qwen2", tmp_path, text())
    for grid, values in zip(grids_of(tmp_path)[name], values_of(name), strict=True):
        assert grid is not None
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        assert grid.scale == pytest.approx((high - low) / 255, rel=1e-3)
        assert grid.zero_point == pytest.approx(-low / grid.scale, abs=0.6)


def test_symmetric_ranges_are_around_zero(tmp_path: Path) -> None:
    quantize(method(symmetric=True), "qwen2", tmp_path, text())
    grid, after = grids_of(tmp_path)[DOWN]
    largest = float(values_of(DOWN)[0].abs().max())
    assert grid.scale == pytest.approx(2 * largest / 255, rel=0.01)
    assert grid.zero_point in (127, 128)
    assert after is None


def test_percentile_clips(tmp_path: Path) -> None:
    widths = []
    for percentile in (100.0, 99.0, 90.0):
        folder = tmp_path / str(percentile)
        folder.mkdir()
        chosen = method(calibrator="percentile", percentile=percentile)
        quantize(chosen, "qwen2", folder, text())
        grid, _ = grids_of(folder)[DOWN]
        low, high = -grid.zero_point * grid.scale, (255 - grid.zero_point) * grid.scale
        values = values_of(DOWN)[0]
        inside = float(((values > low) & (values < high)).float().mean())
        assert inside == pytest.approx(percentile / 100, abs=0.01)
        widths.append(grid.scale)
    assert widths[0] > widths[1] > widths[2]


def test_entropy_chooses_a_range_of_its_own(tmp_path: Path) -> None:
    """The first sample's range where later ones add little to it, as the documents say."""
    folders = []
    for calibrator in ("min_max", "entropy"):
        folders.append(tmp_path / calibrator)
        folders[-1].mkdir()
        quantize(method(calibrator=calibrator), "qwen2", folders[-1], text())
    plain, chosen = (grids_of(folder) for folder in folders)
    assert plain.keys() == chosen.keys()
    narrower = [name for name in plain if chosen[name][0].scale < 0.99 * plain[name][0].scale]
    assert narrower
    assert all(chosen[name][0].scale < 1.01 * plain[name][0].scale for name in plain)


def test_the_heads_input_is_calibrated_on_every_token(tmp_path: Path) -> None:
    quantize(method(head=True), "qwen2", tmp_path, text())
    model = small("qwen2")
    hidden = model.model(text()).last_hidden_state.detach()
    grid, _ = grids_of(tmp_path)["lm_head"]
    assert grid.scale == pytest.approx(float(hidden.max() - hidden.min()) / 255, rel=1e-3)


def test_formats_store_the_same_integers(tmp_path: Path) -> None:
    stored = []
    for name in ("qdq", "qoperator"):
        folder = tmp_path / name
        folder.mkdir()
        quantize(method(format=name, round_outputs=True), "qwen2", folder, text())
        stored.append(tensors_of(read(folder)))
        assert grids_of(folder)[DOWN][1] is not None
    one, other = (tensors[f"{DOWN}.weight_quantized"] for tensors in stored)
    assert torch.equal(one, other)


def test_the_same_text_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    graphs = []
    for name, ids in (("one", text()), ("two", text()), ("three", tiny_ids(4, 40).flip(1) // 2)):
        folder = tmp_path / name
        folder.mkdir()
        quantize(method(), "gpt2", folder, ids)
        graphs.append((folder / "model.onnx").read_bytes())
    assert graphs[0] == graphs[1] != graphs[2]


def test_a_token_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """Fixed grids: reading token by token gives what reading at once gives."""
    chosen = method()
    quantize(chosen, "qwen2", tmp_path, text())
    engine, ids = chosen.load(tmp_path, Machine()), tiny_ids(1, 12)
    whole, _ = engine.prefill(ids)
    _, cache = engine.prefill(ids[:, :-1])
    step, _ = engine.decode(ids[:, -1:], cache)
    assert divergence(whole[:, -1:], step) < 1e-4


def test_calibrating_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantize(method(calibrator="percentile"), "gpt2", tmp_path, text())
    assert capfd.readouterr() == ("", "")


def test_products_that_are_not_fused_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = method()
    quantize(chosen, "gpt2", tmp_path, text())
    real = onnx_int8_static.load_engine

    def unfused(artefact: Path, hardware: Any, describe: Any, owner: str) -> Any:
        return real(artefact, hardware, lambda operator: describe("MatMul"), owner)

    monkeypatch.setattr(onnx_int8_static, "load_engine", unfused)
    uses = chosen.load(tmp_path, Machine()).kernels()
    assert {use.execution for use in uses} == {"dequantized"}
    assert "DequantizeLinear + MatMul" in uses[0].kernel
    with pytest.raises(ConfigError, match=r"did not fuse transformer\.h\.0\.attn\.c_attn"):
        chosen.load(tmp_path, Machine(allow_fallback=False))


def test_a_broken_weight_is_caught(tmp_path: Path) -> None:
    chosen = method()
    quantize(chosen, "qwen2", tmp_path, text())
    plain = chosen.load_dequantized(tmp_path, Machine())
    for layer in range(2):
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            tensor = f"model.layers.{layer}.{name}.weight_quantized"
            change_tensor(tmp_path, tensor, lambda array: array[::-1].copy())
    with pytest.raises(PathDisagreementError):
        compare_paths(chosen.load(tmp_path, Machine()), plain, tiny_ids(), chosen.path_tolerance)


@pytest.mark.parametrize("calibration", [None, torch.zeros(0, 40, dtype=torch.int64)])
def test_without_calibration_text_it_refuses(calibration: Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs calibration text"):
        method().quantize(small("gpt2"), None, calibration, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"calibrator": "mse"}, Machine(), "is 'mse'; it must be one of min_max, entropy, perc"),
        ({"format": "QDQ"}, Machine(), "is 'QDQ'; it must be one of qdq, qoperator"),
        ({"format": "qoperator"}, Machine(), "qoperator of onnx_int8_static always rounds outputs"),
        ({"percentile": 40}, Machine(), "is 40; it must be above 50"),
        ({"symmetric": 1}, Machine(), "method.symmetric of onnx_int8_static is 1"),
        ({}, Machine("cuda"), "operators of onnx_int8_static are a CPU's"),
        ({}, Machine(compute_dtype="bfloat16"), "set hardware.compute_dtype=float32"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_experts_in_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="onnx_int8_static cannot export Mixtral"):
        method().select(tiny("mixtral"))


def test_the_yaml_builds_the_method() -> None:
    node = OmegaConf.merge({"seed": 7}, {"method": OmegaConf.load(CONF / "onnx_int8_static.yaml")})
    built = instantiate(node.method)
    assert built.calibration.seed == 7
    assert built == OnnxInt8Static("onnx_int8_static", built.calibration)
    assert (built.bits, built.group_size, method(per_channel=False).group_size) == (8, -1, None)
