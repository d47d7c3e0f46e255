"""onnx_int4: the stored layout against one packed by hand, options, and the way through."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

pytest.importorskip("onnxruntime")

from kernels.errors import ConfigError
from methods import onnx_int4
from methods.base import Matrix
from methods.onnx_graph import matrix_of, read, tensors_of
from methods.onnx_int4 import OPERATOR, OnnxInt4, decode
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine
from tests.methods.onnx_models import bits_on_disk, change_tensor, quantize, small

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
DOWN = "model.layers.1.mlp.down_proj"
# Float32 activations: the same weights, summed in another order.
SAME = 1e-4


def method(group_size: int = 16, **options: Any) -> OnnxInt4:
    return OnnxInt4("onnx_int4", group_size, **options)


def decoded(folder: Path, name: str, in_features: int) -> tuple[Tensor, list[Tensor]]:
    """Return the weight that the file holds for the map `name`, and its stored tensors."""
    graph = read(folder)
    stored = tensors_of(graph)
    for node in graph.graph.node:
        if node.op_type == OPERATOR and matrix_of(node.input[1]) == name:
            parts = [stored[one] for one in node.input[1:]]
            return decode(parts, in_features), parts
    raise AssertionError(name)


@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
def test_decoding_reads_what_was_packed_by_hand(zeros: str) -> None:
    """Three groups of 16 in a row of 40: a filled up group, and an odd number of zero points."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (5, 48), generator=generator)
    scales = torch.rand(5, 3, generator=generator)
    points = torch.randint(0, 16, (5, 3), generator=generator)
    packed = torch.zeros(5, 3, 8, dtype=torch.uint8)
    for row in range(5):
        for column in range(48):
            half = codes[row, column] << 4 * (column % 2)
            packed[row, column // 16, column % 16 // 2] |= half.to(torch.uint8)
    stored = [packed, scales]
    if zeros == "none":
        points = torch.full((5, 3), 8)
    elif zeros == "packed":
        high = torch.cat((points[:, 1:2], torch.zeros(5, 1, dtype=torch.int64)), 1)
        stored.append((points[:, ::2] | high << 4).to(torch.uint8))
    else:
        stored.append(points.float().flatten() + 0.25)
    offset = 0.25 if zeros == "float" else 0.0
    expected = torch.empty(5, 40)
    for row in range(5):
        for column in range(40):
            group = column // 16
            level = codes[row, column] - points[row, group] - offset
            expected[row, column] = level * scales[row, group]
    torch.testing.assert_close(decode(stored, 40), expected)


@pytest.mark.parametrize("options", [{"symmetric": True}, {}, {"algorithm": "hqq"}], ids=str)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_round_trip(group_size: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Biases, a tied head, filled up groups; both paths of the same file; sizes to the bit."""
    chosen = method(group_size, accuracy_level=0, **options)
    report = quantize(chosen, "qwen2", tmp_path)
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    engine = chosen.load(tmp_path, Machine())
    expected = logits_of(small("qwen2"), tiny_ids())
    assert 1e-6 < divergence(expected, engine.prefill(tiny_ids())[0]) < 2e-3
    compare_paths(engine, chosen.load_dequantized(tmp_path, Machine()), tiny_ids(), SAME)
    uses = engine.kernels()
    assert [use.name for use in uses] == [matrix.name for matrix in report.quantized]
    if chosen.algorithm == "hqq":
        assert {use.execution for use in uses} == {"dequantized"}
        assert uses[0].kernel == "onnxruntime MatMulNBits, converted to float32 at each call"
    else:
        assert {use.execution for use in uses} == {"packed"}
        assert uses[0].kernel == "onnxruntime MatMulNBits, float32 activations"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_int8_activations(kind: str, symmetric: bool, tmp_path: Path) -> None:
    chosen = method(32, symmetric=symmetric)
    quantize(chosen, kind, tmp_path)
    engine, plain = (
        chosen.load(tmp_path, Machine()),
        chosen.load_dequantized(tmp_path, Machine()),
    )
    compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)
    # Rounded they are: with float32 ones the paths are the same.
    with pytest.raises(PathDisagreementError):
        compare_paths(engine, plain, tiny_ids(), SAME)
    assert all("activations rounded to int8 blocks" in use.kernel for use in engine.kernels())


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_other_levels_are_float32_on_a_cpu(level: int, tmp_path: Path) -> None:
    chosen = method(accuracy_level=level)
    quantize(chosen, "gpt2", tmp_path)
    engine = chosen.load(tmp_path, Machine())
    compare_paths(engine, chosen.load_dequantized(tmp_path, Machine()), tiny_ids(), SAME)
    assert {use.kernel for use in engine.kernels()} == {
        "onnxruntime MatMulNBits, float32 activations"
    }


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_rounded_to_nearest(symmetric: bool, tmp_path: Path) -> None:
    quantize(method(16, symmetric=symmetric), "qwen2", tmp_path)
    weight = small("qwen2").get_submodule(DOWN).weight.detach()
    found, parts = decoded(tmp_path, DOWN, 64)
    groups = weight.view(32, 4, 16)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    # Symmetric: the largest value, whatever its sign, is level -8.
    expected = extreme / -8 if symmetric else span / 15
    torch.testing.assert_close(parts[1].view(32, 4), expected, rtol=1e-4, atol=1e-7)
    error = (found - weight).abs().view(32, 4, 16) / expected.abs()[..., None]
    # A value opposite the largest has no level 8, and a rounded zero point moves both ends.
    assert error.max() <= 1.001
    assert error.mean() < 0.27


def test_hqq_fits_better_than_rounding(tmp_path: Path) -> None:
    errors = []
    for algorithm in ("rtn", "hqq"):
        folder = tmp_path / algorithm
        folder.mkdir()
        quantize(method(32, algorithm=algorithm), "qwen2", folder)
        found, _ = decoded(folder, DOWN, 64)
        weight = small("qwen2").get_submodule(DOWN).weight.detach()
        errors.append(float((found - weight).square().mean()))
    assert errors[1] < 0.97 * errors[0]


def test_head_and_keep_are_the_scope(tmp_path: Path) -> None:
    chosen = method(head=True, keep=["*.v_proj"])
    report = quantize(chosen, "qwen2", tmp_path)
    names = {matrix.name for matrix in report.quantized}
    assert "lm_head" in names
    assert not [name for name in names if name.endswith("v_proj")]
    assert "stored apart" in report.notes[0]
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    engine = chosen.load(tmp_path, Machine())
    assert {use.name for use in engine.kernels()} == names
    plain = chosen.load_dequantized(tmp_path, Machine())
    compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        # A row of 40 in groups of 16: three groups, 48 codes.
        ({"symmetric": True}, 3 * (64 + 32)),
        ({}, 3 * (64 + 32) + 16),
        ({"algorithm": "hqq"}, 3 * (64 + 32 + 32)),
    ],
)
def test_stored_bits_by_hand(options: dict[str, Any], bits: int) -> None:
    assert method(16, **options).stored_bits(Matrix("m", "block", 7, 40)) == 7 * bits


def test_quantizing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        quantize(method(), "gpt2", folder)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]


def test_swapped_halves_are_caught(tmp_path: Path) -> None:
    chosen = method()
    quantize(chosen, "qwen2", tmp_path)
    plain = chosen.load_dequantized(tmp_path, Machine())
    for layer in range(2):
        for name in ("mlp.down_proj", "mlp.up_proj"):
            tensor = f"model.layers.{layer}.{name}.weight_Q4"
            change_tensor(tmp_path, tensor, lambda array: array >> 4 | array << 4)
    with pytest.raises(PathDisagreementError):
        compare_paths(chosen.load(tmp_path, Machine()), plain, tiny_ids(), chosen.path_tolerance)


def test_a_skipped_matrix_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxInt4._quantize_graph

    def skipping(self: Any, graph: Any, matrices: Any, into: Path) -> None:
        real(self, graph, matrices[1:], into)

    monkeypatch.setattr(OnnxInt4, "_quantize_graph", skipping)
    with pytest.raises(RuntimeError, match=r"skipped 1 \(model.layers.0.self_attn.q_proj\)"):
        quantize(method(), "qwen2", tmp_path)


def test_loggers_are_left_alone_and_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's module sets up logging when it is imported, where nobody has."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", False)
    level = root.level
    quantize(method(), "gpt2", tmp_path)
    assert (root.handlers, root.level) == ([], level)
    assert capfd.readouterr() == ("", "")


def test_another_operator_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="onnxruntime runs MatMul where onnx_int4 stored"):
        method()._describe("MatMul")
    assert onnx_int4.ACCURACY_LEVELS == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"group_size": 8}, Machine(), "group_size of onnx_int4 is 8; .* 16, 32, 64, 128, 256"),
        ({"group_size": -1}, Machine(), "group_size of onnx_int4 is -1"),
        ({"algorithm": "gptq"}, Machine(), "algorithm of onnx_int4 is 'gptq'; .* rtn, hqq"),
        ({"accuracy_level": 5}, Machine(), "accuracy_level of onnx_int4 is 5"),
        ({"accuracy_level": True}, Machine(), "accuracy_level of onnx_int4 is True"),
        ({"symmetric": 1}, Machine(), "method.symmetric of onnx_int4 is 1"),
        ({"algorithm": "hqq", "symmetric": True}, Machine(), "set method.symmetric=false"),
        ({"algorithm": "hqq"}, Machine(allow_fallback=False), "converts matrices of onnx_int4"),
        ({}, Machine("cuda"), "operators of onnx_int4 are a CPU's"),
        ({}, Machine(compute_dtype="bfloat16"), "set hardware.compute_dtype=float32"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**{"group_size": 32, **options}).check(machine)
    assert "\n" not in str(caught.value)


def test_experts_in_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="onnx_int4 cannot export Mixtral"):
        method().select(tiny("mixtral"))


def test_the_yaml_builds_the_method() -> None:
    node = OmegaConf.merge({"group_size": 64}, {"method": OmegaConf.load(CONF / "onnx_int4.yaml")})
    built = instantiate(node.method)
    assert built == method(64)
    assert (built.bits, built.group_size) == (4, 64)
