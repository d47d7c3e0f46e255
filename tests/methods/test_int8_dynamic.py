"""int8_dynamic: what is loaded is what PyTorch's quantize_dynamic makes, bit for bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from kernels.errors import ConfigError
from methods.int8_dynamic import Int8Dynamic
from methods.int8_dynamic_layers import (
    PackedEmbedding,
    PackedLinear,
    StoredLinear,
    TorchaoLinear,
    announced_removals_silenced,
)
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


def method(**options: Any) -> Int8Dynamic:
    return Int8Dynamic("int8_dynamic", **options)


def quantized_by_pytorch(model: Any, per_channel: bool, embeddings: bool) -> Any:
    """Return a copy that quantize_dynamic itself made of every linear map but the head."""
    with announced_removals_silenced():
        from torch.ao import quantization

        linear = (
            quantization.per_channel_dynamic_qconfig
            if per_channel
            else quantization.default_dynamic_qconfig
        )
        wanted: dict[Any, Any] = {
            name: linear
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        if embeddings:
            wanted[nn.Embedding] = quantization.float_qparams_weight_only_qconfig
        return quantization.quantize_dynamic(copy.deepcopy(model), wanted)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loaded_model_is_pytorchs_own_bit_for_bit(
    tmp_path: Path, bias: bool, per_channel: bool, embeddings: bool
) -> None:
    model = llama(bias=bias)
    expected = logits_of(quantized_by_pytorch(model, per_channel, embeddings), tokens())
    chosen = method(per_channel=per_channel, embeddings=embeddings)
    _, engine = round_trip(chosen, model, tmp_path)
    assert torch.equal(engine.prefill(tokens())[0], expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_divergence_is_small_and_not_zero(build: Any, per_channel: bool, tmp_path: Path) -> None:
    model = build()
    expected = logits_of(model, tokens())
    _, engine = round_trip(method(per_channel=per_channel), model, tmp_path)
    kl = divergence(expected, engine.prefill(tokens())[0])
    assert 1e-9 < kl < 5e-3


def test_conv1d_is_the_same_linear_map(tmp_path: Path) -> None:
    model = gpt2()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    bias = model.transformer.h[0].mlp.c_fc.bias.detach().clone()
    report, engine = round_trip(method(), model, tmp_path)
    assert len(report.quantized) == 8
    loaded: Any = engine
    packed = loaded.model.transformer.h[0].mlp.c_fc
    assert isinstance(packed, PackedLinear)
    assert torch.equal(packed.linear.bias(), bias)
    step = float(weight.abs().max()) / 127.5
    assert float((packed.linear.weight().dequantize() - weight).abs().max()) <= step / 2 * 1.001


@pytest.mark.parametrize("options", [{}, {"head": True}, {"embeddings": True, "head": True}])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_packed_and_dequantized_paths_agree(
    build: Any, options: dict[str, bool], tmp_path: Path
) -> None:
    chosen = method(**options)
    _, engine = round_trip(chosen, build(), tmp_path)
    plain = chosen.load_dequantized(tmp_path, Machine())
    assert {use.execution for use in engine.kernels()} == {"packed"}
    assert {use.execution for use in plain.kernels()} == {"dequantized"}
    compare_paths(engine, plain, tokens(), chosen.path_tolerance)


def test_one_layer_agrees_with_its_dequantized_self_closely() -> None:
    torch.manual_seed(0)
    float_layer = nn.Sequential(nn.Linear(48, 33))
    with announced_removals_silenced():
        from torch.ao import quantization

        own = quantization.quantize_dynamic(float_layer, {nn.Linear})[0]
    float_bias = float_layer[0].bias.detach()
    packed = PackedLinear(StoredLinear.of(own, float_bias))
    x = torch.randn(5, 7, 48)
    expected = packed(x)
    assert torch.equal(expected, own(x))
    packed.dequantized = True
    torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)


def test_activations_have_seven_bits() -> None:
    """PyTorch asks for reduce_range under x86: the claim of the module's docstring."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm", "onednn"):
        pytest.skip("qnnpack ignores reduce_range")
    weight = torch.eye(64, dtype=torch.int8)
    stored = StoredLinear(weight, torch.ones(1), torch.zeros(1, dtype=torch.int32), None)
    ramp = torch.linspace(-1, 1, 64 * 100).reshape(100, 64)
    # 127 steps; rounding both ends outwards may add one value.
    assert PackedLinear(stored)(ramp).unique().numel() in (128, 129)


@pytest.mark.parametrize("per_channel", [False, True])
def test_stored_bits_are_the_bits_on_disk(tmp_path: Path, per_channel: bool) -> None:
    chosen = method(per_channel=per_channel, head=True, embeddings=True)
    report, _ = round_trip(chosen, llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = sum(
        8 * tensors[f"{matrix.name}.{part}"].nbytes
        for matrix in report.quantized
        for part in ("weight", "scale", "zero_point")
    )
    assert report.stored_bits == stored
    assert {m.role for m in report.quantized} == {"block", "head", "embedding"}


def test_the_artefact_holds_no_pickle(tmp_path: Path) -> None:
    round_trip(method(), llama(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("options", [{"head": True}, {"embeddings": True}])
def test_tied_weights_are_said(tmp_path: Path, options: dict[str, bool]) -> None:
    model = llama(tied=True)
    expected = logits_of(model, tokens())
    report, engine = round_trip(method(**options), model, tmp_path)
    assert "stored apart" in report.notes[0]
    assert divergence(expected, engine.prefill(tokens())[0]) < 5e-3


def test_provenance_names_op_and_engine(tmp_path: Path) -> None:
    report, engine = round_trip(method(embeddings=True), llama(), tmp_path)
    uses = {use.name: use for use in engine.kernels()}
    assert set(uses) == {matrix.name for matrix in report.quantized}
    linear = uses["model.layers.0.mlp.up_proj"]
    assert linear.kernel.startswith("quantized::linear_dynamic, engine ")
    assert (linear.layer, linear.execution, linear.weights) == ("PackedLinear", "packed", 64 * 128)
    assert uses["model.embed_tokens"].kernel == "quantized::embedding_byte"
    loaded: Any = engine
    module = loaded.model.model.layers[0].mlp.up_proj.linear
    assert type(module) is torch.ao.nn.quantized.dynamic.Linear
    assert isinstance(loaded.model.model.embed_tokens, PackedEmbedding)
    ids = tokens()
    both = loaded.prefill(ids)[0]
    assert not torch.allclose(both[:1], loaded.prefill(ids[:1])[0], rtol=1e-4, atol=1e-4)
    assert loaded.couples_rows


def test_experts_in_stacks_are_left_out_and_said() -> None:
    matrices, left_out = method().select(mixtral())
    assert matrices
    assert all(matrix.count == 1 for matrix in matrices)
    experts = [entry for entry in left_out if "experts" in entry[2]]
    assert sum(weights for _, weights, _ in experts) == 4 * 3 * 32 * 64
    total = sum(parameter.numel() for parameter in mixtral().parameters())
    covered = sum(matrix.weights for matrix in matrices)
    assert covered + sum(weights for _, weights, _ in left_out) == total


def test_kept_matrices_stay_float(tmp_path: Path) -> None:
    report, engine = round_trip(method(keep=["*.down_proj"]), llama(), tmp_path)
    loaded: Any = engine
    assert isinstance(loaded.model.model.layers[0].mlp.down_proj, nn.Linear)
    assert not any(m.name.endswith("down_proj") for m in report.quantized)


class ScaledEmbedding(nn.Embedding):
    """An embedding of a model's own, which quantize_dynamic does not know."""


def test_a_module_that_pytorch_skips_is_named(tmp_path: Path) -> None:
    model = llama()
    model.set_input_embeddings(ScaledEmbedding(96, 64))
    with pytest.raises(ConfigError, match=r"does not convert model\.embed_tokens, a ScaledEmb"):
        method(embeddings=True).quantize(model, None, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.up_proj holds 1 values"):
        method().quantize(model, None, None, tmp_path)


def test_no_warning_escapes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = method(embeddings=True)
        _, engine = round_trip(chosen, llama(), tmp_path)
        engine.prefill(tokens())
        chosen.load_dequantized(tmp_path, Machine()).prefill(tokens())


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"per_channel": "yes"}, Machine(), "method.per_channel of int8_dynamic is 'yes'"),
        ({}, Machine(compute_dtype="bfloat16"), "set hardware.compute_dtype=float32"),
        ({"embeddings": True}, Machine("cuda", "bfloat16"), "set it to false on cuda"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_the_yaml_builds_the_method() -> None:
    built = instantiate(OmegaConf.load(CONF / "int8_dynamic.yaml"))
    assert built == method()
    assert (built.bits, built.group_size, method(per_channel=True).group_size) == (8, None, -1)


@pytest.mark.parametrize("shape", [(3, 64), (2, 20, 64), (1, 1, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_path_is_torchaos_own(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    """The module made for a card, run here through torchao's CPU kernel."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    linear = nn.Linear(64, 40, bias=bias).to(dtype).requires_grad_(False)
    reference = nn.Sequential(copy.deepcopy(linear))
    config = torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    torchao.quantize_(reference, config)
    weight: Any = reference[0].weight
    zero_point = torch.zeros(40, dtype=torch.int32)
    own_bias = linear.bias.float() if bias else None
    stored = StoredLinear(weight.qdata, weight.scale[:, 0], zero_point, own_bias)
    ours = TorchaoLinear(stored, dtype)
    x = torch.randn(shape).to(dtype)
    expected = reference(x)
    assert torch.equal(ours(x), expected)
    ours.dequantized = True
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance)


def test_torchao_path_takes_one_scale_a_matrix() -> None:
    pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (24, 32), dtype=torch.int8)
    stored = StoredLinear(weight, torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32), None)
    module = TorchaoLinear(stored, torch.float32)
    x = torch.randn(4, 32)
    expected = x @ (weight * 0.02).T
    assert float((module(x) - expected).norm() / expected.norm()) < 0.02
