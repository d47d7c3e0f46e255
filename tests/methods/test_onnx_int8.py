"""onnx_int8_dynamic: rounding against ONNX Runtime's operators, and the way through an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

pytest.importorskip("onnxruntime")

from kernels.errors import ConfigError
from methods import onnx_graph, onnx_int8
from methods.base import KernelUse
from methods.onnx_graph import read, tensors_of
from methods.onnx_int8 import Grid, OnnxInt8Dynamic, decode, describe_integers, dynamic_grid
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine
from tests.methods.onnx_models import bits_on_disk, change_tensor, quantize, small

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"per_channel": False},
    {"symmetric": False},
    {"symmetric": False, "per_channel": False},
    {"reduce_range": True},
    {"head": True},
    {"keep": ["*.0.mlp.down_proj", "*.v_proj"]},
]


def method(**options: Any) -> OnnxInt8Dynamic:
    return OnnxInt8Dynamic("onnx_int8_dynamic", **options)


def run_operator(operator: str, inputs: dict[str, Any], outputs: list[str]) -> list[Any]:
    """Return what ONNX Runtime's `operator` makes of `inputs`."""
    import onnx
    import onnxruntime

    kinds = {"float32": 1, "uint8": 2}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, list(inputs), outputs)],
        "one",
        [
            onnx.helper.make_tensor_value_info(name, kinds[str(one.dtype)], one.shape)
            for name, one in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found: list[Any] = session.run(None, inputs)
    return found


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0, 0.4])
def test_rounding_is_that_of_the_operators(shift: float) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) + shift
    q, scale, zero = run_operator("DynamicQuantizeLinear", {"x": x.numpy()}, ["q", "s", "z"])
    grid = dynamic_grid(x)
    assert grid.zero_point == int(zero)
    assert grid.scale == pytest.approx(float(scale), rel=1e-6)
    expected = (torch.from_numpy(q).float() - float(zero)) * float(scale)
    torch.testing.assert_close(grid.round(x), expected, rtol=1e-5, atol=1e-6)


def test_rounding_to_a_fixed_grid_is_that_of_the_operator() -> None:
    """Ties, and values beyond both ends."""
    x, grid = torch.linspace(-9, 9, 73), Grid(0.0625, 100)
    feeds = {
        "x": x.numpy(),
        "s": numpy.array(grid.scale, numpy.float32),
        "z": numpy.array(grid.zero_point, numpy.uint8),
    }
    (q,) = run_operator("QuantizeLinear", feeds, ["q"])
    expected = (torch.from_numpy(q).float() - grid.zero_point) * grid.scale
    assert torch.equal(grid.round(x), expected)
    assert (expected != x).any()


def test_zeros_stay_zeros() -> None:
    assert torch.equal(dynamic_grid(torch.zeros(3, 4)).round(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_round_trip(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Biases, Conv1D, a tied head; both paths of the same file; sizes to the bit."""
    if kind == "gpt2" and "keep" in options:
        options = {"keep": ["*.c_fc"]}
    chosen = method(**options)
    report = quantize(chosen, kind, tmp_path)
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    engine = chosen.load(tmp_path, Machine())
    expected = logits_of(small(kind), tiny_ids())
    assert 1e-8 < divergence(expected, engine.prefill(tiny_ids())[0]) < 1e-4
    plain = chosen.load_dequantized(tmp_path, Machine())
    compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)
    assert {use.execution for use in plain.kernels()} == {"dequantized"}
    assert [use.name for use in plain.kernels()] == [one.name for one in report.quantized]


def test_head_and_keep_are_the_scope(tmp_path: Path) -> None:
    model = small("qwen2")
    plain = {matrix.name for matrix in method().select(model)[0]}
    with_head = {matrix.name for matrix in method(head=True).select(model)[0]}
    assert with_head - plain == {"lm_head"}
    kept = {matrix.name for matrix in method(keep=["*.v_proj"]).select(model)[0]}
    assert plain - kept == {f"model.layers.{n}.self_attn.v_proj" for n in range(2)}
    chosen = method(keep=["*.v_proj"])
    quantize(chosen, "qwen2", tmp_path)
    assert onnx_graph.tensor_bytes(tmp_path)["model.layers.0.self_attn.v_proj.weight"] > 0
    assert {use.name for use in chosen.load(tmp_path, Machine()).kernels()} == kept


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 64)])
def test_weights_are_rounded_to_nearest(
    reduce_range: bool, largest: int, per_channel: bool, tmp_path: Path
) -> None:
    quantize(method(per_channel=per_channel, reduce_range=reduce_range), "qwen2", tmp_path)
    stored = tensors_of(read(tmp_path))
    name = "model.layers.1.mlp.down_proj"
    weight = small("qwen2").get_submodule(name).weight.detach()
    extremes = weight.abs().amax(1) if per_channel else weight.abs().max()
    scale = stored[f"{name}.weight_scale"]
    torch.testing.assert_close(scale, extremes / largest, rtol=0.01, atol=0)
    error = (decode(stored, name) - weight).abs()
    assert (error <= 0.501 * (scale[:, None] if per_channel else scale)).all()
    assert not stored[f"{name}.weight_zero_point"].any()
    assert stored[f"{name}.weight_quantized"].abs().max() <= largest


def test_asymmetric_weights_use_both_ends(tmp_path: Path) -> None:
    quantize(method(symmetric=False), "qwen2", tmp_path)
    stored = tensors_of(read(tmp_path))
    name = "model.layers.0.mlp.up_proj"
    weight = small("qwen2").get_submodule(name).weight.detach()
    span = weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)
    torch.testing.assert_close(stored[f"{name}.weight_scale"], span / 255, rtol=1e-4, atol=0)
    assert stored[f"{name}.weight_quantized"].dtype == torch.uint8
    assert len(stored[f"{name}.weight_zero_point"].unique()) > 1


def test_provenance_is_read_from_the_session(tmp_path: Path) -> None:
    chosen = method()
    quantize(chosen, "qwen2", tmp_path)
    uses = {use.name: use for use in chosen.load(tmp_path, Machine()).kernels()}
    shared = uses["model.layers.0.self_attn.k_proj"]
    own = uses["model.layers.1.mlp.down_proj"]
    assert "MatMulIntegerToFloat, 8-bit" in shared.kernel
    assert "DynamicQuantizeMatMul, 8-bit" in own.kernel
    assert "u8 on the range of each call" in own.kernel
    assert own == KernelUse(own.name, "MatMul", own.kernel, "packed", 32 * 64)


@pytest.mark.parametrize(
    ("vnni", "reduced", "said"), [(True, False, False), (False, False, True), (False, True, False)]
)
def test_saturating_sums_are_said(
    vnni: bool, reduced: bool, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_int8, "has_exact_sums", lambda: vnni)
    kernel, execution = describe_integers("QLinearMatMul", "u8", reduced)
    assert ("can saturate" in kernel) == said
    assert execution == "packed"


def test_a_float_operator_is_no_integer_kernel() -> None:
    kernel, execution = describe_integers("MatMul", "u8", False)
    assert (kernel, execution) == ("onnxruntime DequantizeLinear + MatMul, float32", "dequantized")


def test_a_broken_weight_is_caught(tmp_path: Path) -> None:
    chosen = method()
    quantize(chosen, "qwen2", tmp_path)
    plain = chosen.load_dequantized(tmp_path, Machine())
    name = "model.layers.1.mlp.down_proj.weight_scale"
    change_tensor(tmp_path, name, lambda array: array[::-1] * 3)
    with pytest.raises(PathDisagreementError):
        compare_paths(chosen.load(tmp_path, Machine()), plain, tiny_ids(), chosen.path_tolerance)


def test_a_skipped_matrix_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxInt8Dynamic._quantize_graph

    def skipping(self: Any, source: Path, matrices: Any, into: Path) -> None:
        real(self, source, matrices[1:], into)

    monkeypatch.setattr(OnnxInt8Dynamic, "_quantize_graph", skipping)
    with pytest.raises(RuntimeError, match=r"skipped 1 \(model.layers.0.self_attn.q_proj\)"):
        quantize(method(), "qwen2", tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model: Any = small("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="c_fc holds 1 values that are NaN or infinite"):
        method().quantize(model, None, None, tmp_path)


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"per_channel": 1}, Machine(), "method.per_channel of onnx_int8_dynamic is 1"),
        ({"reduce_range": None}, Machine(), "method.reduce_range of onnx_int8_dynamic is None"),
        ({"keep": "*.up_proj"}, Machine(), "it must be a list"),
        ({}, Machine("cuda"), "operators of onnx_int8_dynamic are a CPU's"),
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
    with pytest.raises(ConfigError, match="onnx_int8_dynamic cannot export Mixtral"):
        method().select(tiny("mixtral"))


def test_a_token_depends_on_its_neighbours(tmp_path: Path) -> None:
    """One range a call, as the documents of the method say."""
    chosen = method()
    quantize(chosen, "qwen2", tmp_path)
    engine, ids = chosen.load(tmp_path, Machine()), tiny_ids(2, 12)
    both: Tensor = engine.prefill(ids)[0]
    alone = engine.prefill(ids[:1])[0]
    assert not torch.allclose(both[:1], alone, rtol=1e-4, atol=1e-4)
    loaded: Any = engine
    assert loaded.couples_rows


def test_the_yaml_builds_the_method() -> None:
    built = instantiate(OmegaConf.load(CONF / "onnx_int8_dynamic.yaml"))
    assert built == method()
    assert (built.bits, built.group_size, method(per_channel=False).group_size) == (8, -1, None)
