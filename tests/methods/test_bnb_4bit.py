"""nf4 and fp4: the way through a checkpoint, sizes, options and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from kernels.errors import ConfigError
from methods import bitsandbytes_engine, library
from methods.base import Matrix
from methods.bnb_4bit import Bnb4Bit
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import logits_of, tiny, tiny_ids
from tests.methods.int8_models import divergence, round_trip
from tests.methods.layer_checks import bits_on_disk
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
bnb = bitsandbytes_engine.library()
needs_kernel = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="without AVX512_BF16 every matrix is dequantized"
)


def method(kind: Any = "nf4", block_size: int = 32, **options: Any) -> Bnb4Bit:
    return Bnb4Bit(kind, kind, block_size, **options)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an NF4 checkpoint of a model whose matrices the CPU's kernel takes all."""
    into = tmp_path_factory.mktemp("gpt2")
    method().quantize(tiny("gpt2"), None, None, into)
    return into


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "llama_tied", "mixtral"])
def test_round_trip(architecture: str, double: bool, kind: str, tmp_path: Path) -> None:
    """Biases, Conv1D, a tied head; and both paths of the same files."""
    model, chosen = tiny(architecture), method(kind, double_quantization=double)
    expected = logits_of(model, tiny_ids())
    report, engine = round_trip(chosen, model, tmp_path)
    assert 1e-6 < divergence(expected, engine.prefill(tiny_ids())[0]) < 3e-3
    plain = chosen.load_dequantized(tmp_path, Machine())
    compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)
    assert {use.name for use in engine.kernels()} == {one.name for one in report.quantized}
    assert sum(use.weights for use in engine.kernels()) == sum(m.weights for m in report.quantized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_stored_bits_are_the_bits_on_disk(
    architecture: str, double: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, chosen = tiny(architecture), method(block_size=32, double_quantization=double)
    model.config.dtype = dtype
    report = chosen.quantize(model, None, None, tmp_path)
    assert report.stored_bits == bits_on_disk(report, tmp_path)
    # By arithmetic all but the digits of a mean and the eighth letter of `bfloat16`.
    for matrix in report.quantized:
        counted = sum(
            8 * part.nbytes
            for name, part in load_file(tmp_path / "model.safetensors").items()
            if name.startswith(f"{matrix.name}.weight")
        )
        letters = 8 if dtype == torch.bfloat16 else 0
        assert abs(chosen.stored_bits(matrix) + letters - counted) <= (8 * 8 if double else 0)


def test_bits_a_weight_without_the_constants() -> None:
    """QLoRA, section 3: 0.5 bits of scales at blocks of 64, 0.127 with double quantization."""
    matrix = Matrix("a", "block", 4096, 4096)
    plain, nested = (Bnb4Bit("nf4", "nf4", 64, double_quantization=on) for on in (False, True))
    assert plain.stored_bits(matrix) / matrix.weights == pytest.approx(4.5, abs=1e-4)
    assert nested.stored_bits(matrix) / matrix.weights == pytest.approx(4.127, abs=1e-3)


def test_every_option_has_an_effect(tmp_path: Path) -> None:
    chosen = {
        "nf4": method(),
        "fp4": method("fp4"),
        "double": method(double_quantization=True),
        "keep": method(keep=["*.c_proj"]),
    }
    logits = {}
    for name, one in chosen.items():
        _, engine = round_trip(one, tiny("gpt2"), tmp_path / name)
        logits[name] = engine.prefill(tiny_ids())[0]
        if name == "keep":
            block = engine.model.transformer.h[0]  # type: ignore[attr-defined]
            kinds = {key: type(block.mlp.get_submodule(key)).__name__ for key in ("c_fc", "c_proj")}
            assert kinds == {"c_fc": "Linear4bit", "c_proj": "Conv1D"}
    for name in ("fp4", "double", "keep"):
        assert not torch.equal(logits["nf4"], logits[name])


def test_block_size_survives_though_the_configuration_has_none(tmp_path: Path) -> None:
    _, engine = round_trip(method(block_size=32), tiny("gpt2"), tmp_path)
    states = [
        module.weight.quant_state
        for module in engine.model.modules()  # type: ignore[attr-defined]
        if isinstance(module, bnb.nn.Linear4bit)
    ]
    assert {state.blocksize for state in states} == {32}
    assert "blocksize" not in (tmp_path / "config.json").read_text()


def test_smaller_blocks_are_nearer() -> None:
    weight = tiny("llama").model.layers[0].mlp.down_proj.weight.detach()
    errors = []
    for block_size in (32, 64):
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        error = bnb.functional.dequantize_4bit(packed, state) - weight
        errors.append(float(error.square().mean()))
    assert errors[0] < errors[1]


@needs_kernel
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_what_computes_on_a_cpu_whatever_is_asked_for(compute: str, tmp_path: Path) -> None:
    """compute_dtype is written, and only biases are added in it: the product is in bfloat16."""
    logits = []
    for into, dtype in ((tmp_path / "asked", compute), (tmp_path / "usual", "bfloat16")):
        model = tiny("gpt2")
        for name, parameter in model.named_parameters():
            if name.endswith(("c_attn.bias", "c_proj.bias", "c_fc.bias")):
                nn.init.zeros_(parameter)
        _, engine = round_trip(method(compute_dtype=dtype), model, into)
        logits.append(engine.prefill(tiny_ids())[0])
    assert torch.equal(*logits)
    _, engine = round_trip(method(compute_dtype=compute), tiny("gpt2"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == compute
    uses = engine.kernels()
    assert {use.execution for use in uses} == {"packed"}
    assert {use.layer for use in uses} == {"Linear4bit"}
    assert all("bfloat16 activations and scales" in use.kernel for use in uses)
    assert all(("float32 was asked for" in use.kernel) == (compute == "float32") for use in uses)


@needs_kernel
def test_the_kernel_named_is_the_one_that_runs(gpt2: Path) -> None:
    engine = method().load(gpt2, Machine())
    with torch.profiler.profile() as profile:
        engine.prefill(tiny_ids())
    called = [event.key for event in profile.key_averages()]
    assert "bitsandbytes::gemv_4bit" in called
    assert "bitsandbytes::dequantize_4bit" not in called


@needs_kernel
def test_a_broken_weight_is_caught(gpt2: Path) -> None:
    chosen = method()
    engine, plain = chosen.load(gpt2, Machine()), chosen.load_dequantized(gpt2, Machine())
    loaded: Any = engine
    weight = loaded.model.transformer.h[0].mlp.c_fc.weight
    weight.data = weight.data.bitwise_xor(0x80)
    with pytest.raises(PathDisagreementError, match="prefill"):
        compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)


def test_bfloat16_activations(gpt2: Path) -> None:
    engine: Any = method().load(gpt2, Machine(compute_dtype="bfloat16"))
    assert engine.model.transformer.ln_f.weight.dtype == torch.bfloat16
    difference = divergence(logits_of(tiny("gpt2"), tiny_ids()), engine.prefill(tiny_ids())[0])
    assert difference < 5e-3


def test_same_input_same_files(gpt2: Path, tmp_path: Path) -> None:
    method().quantize(tiny("gpt2"), None, None, tmp_path)
    for path in gpt2.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_experts_in_stacks_are_left_out_and_said(tmp_path: Path) -> None:
    report = method().quantize(tiny("mixtral"), None, None, tmp_path)
    assert len(report.quantized) == 2 * 4
    experts = [entry for entry in report.left_out if "stack of experts" in entry[2]]
    assert sum(weights for _, weights, _ in experts) == 2 * 4 * 3 * 32 * 64
    assert "bitsandbytes" in experts[0][2]


def test_a_block_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"width 32 is not a multiple of .* that fit it: 32"):
        method(block_size=64).select(tiny("llama"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, float("nan"))
    with pytest.raises(ConfigError, match=r"up_proj holds 2048 values that are NaN"):
        method().quantize(model, None, None, tmp_path)


def test_without_the_library_it_says_how_to_install_it(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "find_spec", lambda package: None)
    method().check(Machine())
    for use in (
        lambda: method().quantize(tiny("gpt2"), None, None, tmp_path),
        lambda: method().load(gpt2, Machine()),
    ):
        with pytest.raises(ConfigError, match=r"pip install .* bitsandbytes"):
            use()


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"kind": "int4"}, Machine(), "method.kind of int4 is 'int4'; .* nf4, fp4"),
        ({"block_size": 48}, Machine(), "method.block_size of nf4 is 48; .* 32, 64, 128"),
        ({"compute_dtype": "int8"}, Machine(), "compute_dtype of nf4 is 'int8'; .* bfloat16"),
        ({"double_quantization": 1}, Machine(), "double_quantization of nf4 is 1; .* true or"),
        ({"keep": "a"}, Machine(), "method.keep is 'a'; it must be a list"),
        ({}, Machine(compute_dtype="float16"), "use 'float32' or 'bfloat16'"),
        ({"compute_dtype": "float16"}, Machine(), "'float16', which a CPU emulates"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_another_type_than_the_kernels_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(allow_fallback=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    method().check(machine)
    with pytest.raises(ConfigError, match="computes in bfloat16, not in float32"):
        method(compute_dtype="float32").check(machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    method(compute_dtype="float32").check(machine)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_yaml_builds_the_method(kind: str) -> None:
    built = instantiate(OmegaConf.load(CONF / f"{kind}.yaml"))
    assert built == Bnb4Bit(kind, kind, 64, False, "bfloat16")
    assert (built.bits, built.group_size) == (4.0, 64)
