"""torchao_int4: codes and scales against the formulas, the kernels that run, the way to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels.errors import ConfigError
from kernels.pack import unpack
from methods import library
from methods.packed import PathDisagreementError, compare_paths
from methods.torchao_int4 import TorchaoInt4
from methods.torchao_int4_layers import OpaqueLinear, StoredInt4, opaque_codes
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
BOTH = ["none", "dynamic"]
KERNEL_OP = "aten::_weight_int4pack_mm_for_cpu"


def method(activations: str = "none", group_size: int = 32, **options: Any) -> TorchaoInt4:
    return TorchaoInt4("torchao_int4", group_size, activations, **options)


def ops(engine: Any, ids: Tensor) -> set[str]:
    """Return the names of the operations that run while `engine` reads `ids`."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        engine.prefill(ids)
    return {event.key for event in seen.key_averages()}


def grouped(weight: Tensor, group_size: int = 32) -> Tensor:
    """Return bfloat16 [out, groups, group_size]."""
    return weight.detach().bfloat16().reshape(weight.shape[0], -1, group_size)


def stored_of(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(f"{UP}."): t for name, t in tensors.items() if name.startswith(UP)}


def test_weight_only_follows_tinygemm(tmp_path: Path) -> None:
    model = llama()
    weight = grouped(model.get_submodule(UP).weight)
    method().quantize(model, None, None, tmp_path)
    stored = stored_of(tmp_path)
    low, high = weight.amin(-1), weight.amax(-1)
    scale = (high - low) / 15
    assert torch.equal(stored["scale"], scale)
    assert torch.equal(stored["offset"], low + scale * 8)
    codes = unpack(stored["packed"], 4, 64).reshape(weight.shape).double()
    exact = (weight.double() - low.double()[..., None]) / scale.double()[..., None]
    # Arithmetic in bfloat16 moves a weight by a fraction of a step before it is rounded.
    assert float((codes - exact).abs().max()) < 0.75
    assert codes.min() == 0
    assert codes.max() == 15


def test_dynamic_weights_are_symmetric(tmp_path: Path) -> None:
    model = llama()
    weight = grouped(model.get_submodule(UP).weight)
    method("dynamic").quantize(model, None, None, tmp_path)
    stored = stored_of(tmp_path)
    assert set(stored) == {"packed", "scale"}
    scale = weight.abs().amax(-1) / 7.5
    assert torch.equal(stored["scale"], scale)
    q = unpack(stored["packed"], 4, 64).reshape(weight.shape).double() - 8
    exact = (weight.double() / scale.double()[..., None]).clamp(-8, 7)
    assert float((q - exact).abs().max()) < 0.55


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_kernel_tells_its_codes(group_size: int) -> None:
    """Whatever the order in which this processor's kernel keeps them."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (80, 256), dtype=torch.uint8)
    scale = torch.rand(80, 256 // group_size).bfloat16()
    stored = StoredInt4(_packed(codes), scale, torch.randn_like(scale), None)
    layer = OpaqueLinear(stored, torch.float32)
    assert torch.equal(opaque_codes(layer.weight), codes)
    x = torch.randn(5, 256)
    expected = x.bfloat16().float() @ stored.decode().T
    assert float((layer(x) - expected).abs().max() / expected.abs().max()) < 1e-2


def _packed(codes: Tensor) -> Tensor:
    """Return two codes a byte, the first in the low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


@pytest.mark.parametrize("activations", BOTH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_paths_agree_and_rows_say_what_runs(
    build: Any, activations: str, dtype: str, tmp_path: Path
) -> None:
    model = build()
    expected = logits_of(model, tokens())
    machine = Machine(compute_dtype=dtype)
    chosen = method(activations)
    report, engine = round_trip(chosen, model, tmp_path, machine=machine)
    plain = chosen.load_dequantized(tmp_path, machine)
    assert 1e-9 < divergence(expected, engine.prefill(tokens())[0]) < 0.6
    compare_paths(engine, plain, tokens(), chosen.path_tolerance)
    uses = engine.kernels()
    packed = activations == "none"
    assert {use.execution for use in uses} == {"packed" if packed else "dequantized"}
    assert {use.execution for use in plain.kernels()} == {"dequantized"}
    assert all(
        ("bfloat16 activations" in u.kernel) == (packed and dtype != "bfloat16") for u in uses
    )
    assert sum(use.weights for use in uses) == sum(matrix.weights for matrix in report.quantized)
    assert (KERNEL_OP in ops(engine, tokens())) == packed
    assert KERNEL_OP not in ops(plain, tokens())


def test_dynamic_activations_are_rounded(tmp_path: Path) -> None:
    chosen = method("dynamic")
    _, engine = round_trip(chosen, llama(), tmp_path)
    loaded: Any = engine
    linear = loaded.model.get_submodule(UP)
    x = torch.randn(3, 64)
    assert not torch.equal(linear(x), x @ linear.weight.dequantize().T)
    plain: Any = chosen.load_dequantized(tmp_path, Machine())
    torch.testing.assert_close(plain.model.get_submodule(UP)(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", BOTH)
@pytest.mark.parametrize("algorithm", ["tinygemm", "hqq"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_bits_on_disk_and_determinism(
    activations: str, algorithm: str, group_size: int, tmp_path: Path
) -> None:
    chosen = method(activations, group_size, algorithm=algorithm)
    files = []
    for name in ("one", "two"):
        report = chosen.quantize(llama(bias=True), None, None, tmp_path / name)
        assert report.stored_bits == bits_on_disk(report, tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_options_have_effects(tmp_path: Path) -> None:
    weight = llama().get_submodule(UP).weight.detach()
    errors = {}
    for number, options in enumerate(
        [{}, {"algorithm": "hqq"}, {"group_size": 64}, {"activations": "dynamic"}]
    ):
        folder = tmp_path / str(number)
        method(**options).quantize(llama(), None, None, folder)  # type: ignore[arg-type]
        stored = stored_of(folder)
        decoded = StoredInt4(stored["packed"], stored["scale"], stored.get("offset"), None).decode()
        errors[str(options)] = float((decoded - weight).square().mean())
    assert len(set(errors.values())) == 4
    assert errors["{}"] < errors["{'group_size': 64}"]
    assert errors["{}"] < errors["{'activations': 'dynamic'}"]


def swapped(tensors: dict[str, Tensor]) -> None:
    packed = tensors[f"{UP}.packed"]
    tensors[f"{UP}.packed"] = (packed << 4) | (packed >> 4)


def shifted(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.scale"] = tensors[f"{UP}.scale"].roll(1, 0)


@pytest.mark.parametrize("activations", BOTH)
@pytest.mark.parametrize("damage", [swapped, shifted])
def test_weights_that_are_not_the_stored_ones_are_caught(
    damage: Callable[[dict[str, Tensor]], None], activations: str, tmp_path: Path
) -> None:
    chosen = method(activations)
    _, engine = round_trip(chosen, llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PathDisagreementError, match="differ by"):
        compare_paths(
            engine, chosen.load_dequantized(tmp_path, Machine()), tokens(), chosen.path_tolerance
        )


@pytest.mark.parametrize("activations", BOTH)
def test_tied_embeddings_biases_and_a_head(activations: str, tmp_path: Path) -> None:
    model = llama(tied=True, bias=True)
    expected = logits_of(model, tokens())
    report, engine = round_trip(method(activations, head=True), model, tmp_path)
    assert "stored apart" in report.notes[0]
    assert "lm_head" in {use.name for use in engine.kernels()}
    assert divergence(expected, engine.prefill(tokens())[0]) < 0.6
    assert report.stored_bits == bits_on_disk(report, tmp_path)


def test_experts_in_stacks_are_left_out_and_said() -> None:
    matrices, left_out = method().select(mixtral())
    assert all(matrix.count == 1 for matrix in matrices)
    experts = [weights for _, weights, reason in left_out if "stack of experts" in reason]
    assert sum(experts) == 4 * 3 * 32 * 64


def test_kept_matrices_stay_float(tmp_path: Path) -> None:
    _, engine = round_trip(method(keep=["*.down_proj"]), llama(), tmp_path)
    assert not [use.name for use in engine.kernels() if "down_proj" in use.name]
    assert len(engine.kernels()) == 12


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"activations": "static"}, Machine(), "'static'; it must be one of none, dynamic"),
        ({"algorithm": "gptq"}, Machine(), "'gptq'; it must be one of tinygemm, hqq"),
        ({"group_size": 16}, Machine(), "16; the packed weights .* groups of 32, 64, 128"),
        ({"group_size": -1}, Machine(), "-1; the packed weights .* groups of 32, 64, 128"),
        ({"group_size": -1, "activations": "dynamic"}, Machine(), "-1; .* must be 2 or more"),
        ({}, Machine("cuda", "bfloat16"), "is a CPU's, not for cuda; there set"),
        ({}, Machine(compute_dtype="float16"), "float32 or bfloat16 on cpu, not in float16"),
        ({}, Machine(allow_fallback=False), "rounds activations to bfloat16, but hardware.comp"),
    ],
)
def test_refusals_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_without_fallback_bfloat16_runs() -> None:
    method().check(Machine(compute_dtype="bfloat16", allow_fallback=False))
    method("dynamic").check(Machine(allow_fallback=False))
    method("dynamic").check(Machine("cuda", "bfloat16"))


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"has 64 inputs, which groups of 128 do not divide"):
        method(group_size=128).select(llama())
    model = llama()
    model.get_submodule("model.layers.0.self_attn").k_proj = torch.nn.Linear(64, 24)
    with pytest.raises(ConfigError, match=r"k_proj has 24 outputs; .* multiples of 16"):
        method().select(model)


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package torchao.*pip install"):
        method().quantize(llama(), None, None, tmp_path)


def test_the_yaml_builds_the_method() -> None:
    node = OmegaConf.merge(
        {"group_size": 64}, {"method": OmegaConf.load(CONF / "torchao_int4.yaml")}
    )
    built = instantiate(node.method)
    assert built == method(group_size=64)
    assert (built.bits, built.group_size) == (4, 64)
