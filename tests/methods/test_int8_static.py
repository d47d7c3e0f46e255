"""int8_static: integer products against an int32 reference, and the way through an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import int8_static
from methods.base import Calibration
from methods.int8_static import Int8Static, StaticLinear, has_integer_kernel
from methods.observers import OBSERVERS, Grid, grid_of
from methods.packed import compare_paths
from tests.methods.int8_models import (
    divergence,
    gpt2,
    llama,
    logits_of,
    mixtral,
    round_trip,
    tokens,
)
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
CALIBRATION = Calibration(samples=4, seq_len=40, seed=0)

# The integer sum is exact; scaling it by two floats and adding the bias rounds a few times.
FLOAT32_TOLERANCE = 1e-6

needs_integer_kernel = pytest.mark.skipif(
    not has_integer_kernel(), reason="this processor has no VNNI"
)


def method(**options: Any) -> Int8Static:
    return Int8Static("int8_static", options.pop("calibration", CALIBRATION), **options)


def calibration_text() -> Tensor:
    return tokens(4, 40, seed=5)


def random_layer(
    out: int, width: int, *, bias: bool, symmetric: bool, per_channel: bool
) -> StaticLinear:
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8)
    scale = torch.rand(out if per_channel else 1) * 0.01 + 1e-3
    grid = grid_of(-3.0, 4.0, symmetric)
    return StaticLinear(weight, scale, grid, torch.randn(out) if bias else None)


def integer_reference(layer: StaticLinear, weight: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """Return float64 [..., out]: an exact integer product, then scales and bias."""
    q = (x / grid.scale).round() + grid.zero_point
    q = q.clamp(0, 255).long() - grid.zero_point
    product = (q @ weight.long().T).double()
    y = product * grid.scale * layer.scale.double()
    return y if layer.bias is None else y + layer.bias.double()


@needs_integer_kernel
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "out", "width"),
    [(1, 1, 1), (1, 64, 64), (3, 33, 65), (17, 5, 127), (40, 96, 31), (130, 70, 300)],
)
def test_integer_kernel_against_an_integer_reference(
    rows: int, out: int, width: int, bias: bool, per_channel: bool, symmetric: bool
) -> None:
    torch.manual_seed(rows * out + width)
    layer = random_layer(out, width, bias=bias, symmetric=symmetric, per_channel=per_channel)
    weight = layer.weight.clone()
    layer.prepare()
    # Multiples of a third of a step: no ties, and some values beyond the range.
    steps = torch.randint(-500, 500, (rows, width)).float()
    x = (steps + 1 / 3) * layer.grid.scale
    expected = integer_reference(layer, weight, x, layer.grid)
    for dequantized in (False, True):
        layer.dequantized = dequantized
        error = (layer(x) - expected).abs().max() / expected.abs().max()
        assert float(error) < FLOAT32_TOLERANCE


@needs_integer_kernel
@pytest.mark.parametrize("zero_point", [0, 128])
def test_sums_do_not_saturate(zero_point: int) -> None:
    """Largest inputs times largest weights, where 16-bit sums would clip."""
    weight = torch.full((16, 4096), 127, dtype=torch.int8)
    layer = StaticLinear(weight, torch.ones(1), Grid(1.0, zero_point), None)
    layer.prepare()
    largest = 127.0 * (255 - zero_point) * 4096
    assert torch.equal(layer(torch.full((2, 4096), 1e9)), torch.full((2, 16), largest))


@needs_integer_kernel
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_says_that_the_product_is_its_vnni_kernel(
    dtype: torch.dtype, symmetric: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """For some types oneDNN has but reference loops, right and thousands of times slower."""
    layer = random_layer(33, 65, bias=True, symmetric=symmetric, per_channel=True)
    layer.prepare()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        layer(torch.randn(3, 65, dtype=dtype))
    log = [line for line in capfd.readouterr().out.splitlines() if ",exec,cpu,matmul," in line]
    assert len(log) == 1
    assert "vnni" in log[0] or "amx" in log[0]
    assert "src:u8" in log[0]


@needs_integer_kernel
def test_leading_dimensions_and_strides_are_free() -> None:
    torch.manual_seed(0)
    layer = random_layer(24, 32, bias=True, symmetric=False, per_channel=True)
    layer.prepare()
    x = torch.randn(32, 5, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    y = layer(x)
    assert y.shape == (3, 5, 24)
    assert torch.equal(y, layer(x.reshape(15, 32)).reshape(3, 5, 24))


@needs_integer_kernel
def test_bfloat16_in_bfloat16_out() -> None:
    torch.manual_seed(0)
    layer = random_layer(24, 64, bias=True, symmetric=False, per_channel=True)
    layer.prepare()
    x = torch.randn(6, 64).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_round_trip_with_every_observer(build: Any, observer: str, tmp_path: Path) -> None:
    model = build()
    expected = logits_of(model, tokens())
    # Text this short has few values at each end: what percentile drops is then not rare.
    chosen = method(observer=observer, percentile=99.99, averaging=0.1)
    report, engine = round_trip(chosen, model, tmp_path, calibration_text())
    assert len(report.quantized) == (14 if build is llama else 8)
    assert 1e-9 < divergence(expected, engine.prefill(tokens())[0]) < 5e-3


@pytest.mark.parametrize(
    "options", [{"symmetric": True}, {"per_channel": False}, {"head": True}, {}], ids=str
)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_packed_and_dequantized_paths_agree(
    build: Any, options: dict[str, bool], tmp_path: Path
) -> None:
    chosen = method(**options)
    _, engine = round_trip(chosen, build(), tmp_path, calibration_text())
    plain = chosen.load_dequantized(tmp_path, Machine())
    assert {use.execution for use in engine.kernels()} == {"packed"}
    assert {use.execution for use in plain.kernels()} == {"dequantized"}
    compare_paths(engine, plain, tokens(), chosen.path_tolerance)


def test_a_token_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """Fixed grids: reading token by token gives what reading at once gives."""
    _, engine = round_trip(method(), llama(), tmp_path, calibration_text())
    ids = tokens(1, 12)
    whole, _ = engine.prefill(ids)
    _, cache = engine.prefill(ids[:, :-1])
    step, _ = engine.decode(ids[:, -1:], cache)
    assert divergence(whole[:, -1:], step) < 1e-4


@pytest.mark.parametrize("per_channel", [False, True])
def test_stored_bits_are_the_bits_on_disk(tmp_path: Path, per_channel: bool) -> None:
    chosen = method(per_channel=per_channel, head=True)
    report, _ = round_trip(chosen, llama(bias=True), tmp_path, calibration_text())
    tensors = load_file(tmp_path / "model.safetensors")
    parts = ("weight", "scale", "input_scale", "input_zero_point")
    stored = sum(
        8 * tensors[f"{matrix.name}.{part}"].nbytes for matrix in report.quantized for part in parts
    )
    assert report.stored_bits == stored
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_bias_survives(tmp_path: Path) -> None:
    model = gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.bias.normal_()
    expected = logits_of(model, tokens())
    _, engine = round_trip(method(), model, tmp_path, calibration_text())
    assert divergence(expected, engine.prefill(tokens())[0]) < 5e-3


@needs_integer_kernel
def test_provenance_names_the_op(tmp_path: Path) -> None:
    report, engine = round_trip(method(), llama(), tmp_path, calibration_text())
    uses = engine.kernels()
    assert {use.name for use in uses} == {matrix.name for matrix in report.quantized}
    assert {use.kernel for use in uses} == {"onednn::qlinear_pointwise, u8 x s8"}
    assert {use.execution for use in uses} == {"packed"}
    assert sum(use.weights for use in uses) == sum(matrix.weights for matrix in report.quantized)


def test_without_vnni_it_dequantizes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = method()
    model = llama()
    expected = logits_of(model, tokens())
    chosen.quantize(model, None, calibration_text(), tmp_path)
    monkeypatch.setattr(int8_static, "has_integer_kernel", lambda: False)
    engine = chosen.load(tmp_path, Machine(allow_fallback=True))
    assert {use.execution for use in engine.kernels()} == {"dequantized"}
    assert divergence(expected, engine.prefill(tokens())[0]) < 5e-3
    with pytest.raises(ConfigError, match="no VNNI"):
        chosen.load(tmp_path, Machine(allow_fallback=False))


@needs_integer_kernel
def test_bfloat16_activations(tmp_path: Path) -> None:
    model = llama()
    expected = logits_of(model, tokens())
    machine = Machine(compute_dtype="bfloat16")
    _, engine = round_trip(method(), model, tmp_path, calibration_text(), machine)
    loaded: Any = engine
    assert loaded.model.model.norm.weight.dtype == torch.bfloat16
    assert divergence(expected, engine.prefill(tokens())[0]) < 2e-2


def test_kept_matrices_stay_float(tmp_path: Path) -> None:
    _, engine = round_trip(method(keep=["*.down_proj"]), llama(), tmp_path, calibration_text())
    loaded: Any = engine
    assert isinstance(loaded.model.model.layers[0].mlp.down_proj, nn.Linear)
    assert isinstance(loaded.model.model.layers[0].mlp.up_proj, StaticLinear)


def test_tied_head_is_said(tmp_path: Path) -> None:
    model = llama(tied=True)
    expected = logits_of(model, tokens())
    report, engine = round_trip(method(head=True), model, tmp_path, calibration_text())
    assert "stored apart" in report.notes[0]
    assert divergence(expected, engine.prefill(tokens())[0]) < 5e-3


def test_experts_in_stacks_are_left_out_and_said() -> None:
    matrices, left_out = method().select(mixtral())
    assert all(matrix.count == 1 for matrix in matrices)
    experts = [entry for entry in left_out if "experts" in entry[2]]
    assert sum(weights for _, weights, _ in experts) == 4 * 3 * 32 * 64


@pytest.mark.parametrize("calibration", [None, torch.zeros(0, 40, dtype=torch.int64)])
def test_without_calibration_text_it_refuses(calibration: Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs calibration text"):
        method().quantize(llama(), None, calibration, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"observer": "minmax"}, Machine(), "method.observer is 'minmax'; .* min_max, moving"),
        ({"percentile": 40}, Machine(), "method.percentile is 40; it must be above 50"),
        ({"averaging": 0}, Machine(), "method.averaging is 0; it must be above 0"),
        ({"symmetric": 1}, Machine(), "method.symmetric of int8_static is 1"),
        ({}, Machine("cuda", "bfloat16"), "not for cuda; there use method=int8_dynamic"),
        ({}, Machine(compute_dtype="float16"), "set hardware.compute_dtype=float32"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_the_yaml_builds_the_method() -> None:
    node = OmegaConf.merge({"seed": 7}, {"method": OmegaConf.load(CONF / "int8_static.yaml")})
    built = instantiate(node.method)
    assert built.calibration.seed == 7
    assert built == method(calibration=built.calibration)
    assert (built.bits, built.group_size, method(per_channel=False).group_size) == (8, -1, None)
