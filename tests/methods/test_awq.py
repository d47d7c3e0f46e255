"""awq: never worse than rounding to nearest, scales folded rightly, and the way through files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.awq import AWQ
from methods.gptq_format import decode_awq, matrices, scheme_of, unpack
from methods.packed import PathDisagreementError, compare_paths
from tests.methods.gptq_models import (
    CALIBRATION,
    WEIGHTS,
    build,
    calibration_text,
    logits,
    parts_of,
    quantized,
    spoil,
    stored_bits,
)
from tests.methods.gptq_reference import rtn
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
BLOCK = "model.layers.0."


def method(**options: Any) -> AWQ:
    return AWQ("awq", **{"calibration": CALIBRATION, "group_size": 32, **options})


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"zero_point": False},
    "channel": {"group_size": -1},
    "sixteen": {"group_size": 16},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return name of OPTIONS -> folder of the artefact of the llama."""
    folders = {}
    for name, options in OPTIONS.items():
        folders[name] = tmp_path_factory.mktemp(name) / "artefact"
        quantized(method(**options), "llama", folders[name])
    return folders


def decoded(folder: Path, name: str) -> Tensor:
    return decode_awq(parts_of(folder, name), "gemm")


def rounded_to_nearest(chosen: AWQ) -> Any:
    """Return the model with every matrix of its blocks rounded to the same format."""
    model = build("llama")
    with torch.no_grad():
        for matrix in chosen.select(model)[0]:
            weight = model.get_submodule(matrix.name).weight
            weight.copy_(rtn(weight, 4, chosen.group_size, not chosen.zero_point))
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_never_worse_than_rounding_to_nearest_on_the_calibration_text(
    name: str, made: dict[str, Path]
) -> None:
    chosen, ids = method(**OPTIONS[name]), calibration_text()
    expected = logits(build("llama"), ids)
    nearest = divergence(expected, logits(rounded_to_nearest(chosen), ids))
    engine = chosen.load_dequantized(made[name], Machine())
    assert divergence(expected, engine.prefill(ids)[0]) < 0.9 * nearest


def test_what_multiplies_a_column_is_divided_out_of_the_norm(made: dict[str, Path]) -> None:
    """Queries: scaled with keys and values, and not clipped. What is left is rounding."""
    model = build("llama")
    norm, name = f"{BLOCK}input_layernorm", f"{BLOCK}self_attn.q_proj"
    stored = load_file(made["plain"] / WEIGHTS)[f"{norm}.weight"].float()
    divided = stored / model.get_submodule(norm).weight.detach()
    weight, scaled = model.get_submodule(name).weight.detach(), decoded(made["plain"], name)
    multiplied = (weight * scaled).sum(0) / weight.square().sum(0)
    assert float(divided.max() / divided.min()) > 2
    torch.testing.assert_close(divided * multiplied, torch.ones(64), rtol=0.1, atol=0.1)


def test_codes_are_not_those_of_rounding_to_nearest(made: dict[str, Path]) -> None:
    weight = build("llama").get_submodule(f"{BLOCK}mlp.down_proj").weight.detach()
    nearest = rtn(weight, 4, 32, symmetric=False)
    stored = decoded(made["plain"], f"{BLOCK}mlp.down_proj")
    assert float((stored - nearest).norm() / nearest.norm()) > 0.05


def test_the_options_are_what_is_stored(made: dict[str, Path]) -> None:
    name = f"{BLOCK}self_attn.q_proj"
    zeros = unpack(parts_of(made["symmetric"], name)["qzeros"], 4)
    assert set(zeros.flatten().tolist()) == {8}
    assert len(set(unpack(parts_of(made["plain"], name)["qzeros"], 4).flatten().tolist())) > 3
    shapes = {option: parts_of(made[option], name)["scales"].shape[0] for option in OPTIONS}
    assert shapes == {"plain": 2, "symmetric": 2, "channel": 1, "sixteen": 4}
    scheme = scheme_of(made["plain"])
    assert (scheme.kind, scheme.version, scheme.symmetric) == ("awq", "gemm", False)


def test_the_same_inputs_give_the_same_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    quantized(method(), "llama", tmp_path / "again")
    for path in made["plain"].iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_and_decoded_weights_agree(name: str, dtype: str, made: dict[str, Path]) -> None:
    chosen, machine = method(**OPTIONS[name]), Machine(compute_dtype=dtype)
    engine = chosen.load(made[name], machine)
    plain = chosen.load_dequantized(made[name], machine)
    compare_paths(engine, plain, calibration_text()[:2], chosen.path_tolerance)
    uses = engine.kernels()
    assert {use.name for use in uses} == {matrix.name for matrix in matrices(made[name])}
    packed = chosen.group_size == 32
    assert {use.execution for use in uses} == {"packed" if packed else "dequantized"}
    half = "bfloat16" if packed or dtype == "bfloat16" else "float16"
    assert {use.kernel for use in uses} == {
        f"aten::_weight_int4pack_mm_for_cpu in {half}"
        if packed
        else f"dequantize + torch.matmul in {half}"
    }


def test_a_broken_weight_is_caught(made: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(made["plain"], broken)
    spoil(broken, f"{BLOCK}self_attn.v_proj.qzeros")
    engine = method().load(broken, Machine())
    plain = method().load_dequantized(made["plain"], Machine())
    with pytest.raises(PathDisagreementError):
        compare_paths(engine, plain, calibration_text()[:2], method().path_tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_stored_bits_are_the_bits_on_disk(name: str, made: dict[str, Path]) -> None:
    chosen = method(**OPTIONS[name])
    for matrix in chosen.select(build("llama"))[0]:
        parts = parts_of(made[name], matrix.name)
        assert sum(8 * tensor.nbytes for tensor in parts.values()) == chosen.stored_bits(matrix)
    tensors = load_file(made[name] / WEIGHTS)
    assert tensors[f"{BLOCK}input_layernorm.weight"].dtype == torch.float16
    assert json.loads((made[name] / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen2", torch.bfloat16), ("llama_tied", torch.float32)]
)
def test_biases_ties_and_kept_matrices(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    chosen, folder = method(group_size=16, keep=["*.1.mlp.down_proj"]), tmp_path / "artefact"
    expected = logits(build(kind, dtype), calibration_text()[:2])
    report = quantized(chosen, kind, folder, dtype=dtype)
    assert len(report.quantized) == 13
    assert report.stored_bits == stored_bits(folder, report)
    engine = chosen.load(folder, Machine())
    assert divergence(expected, engine.prefill(calibration_text()[:2])[0]) < 0.05
    plain = chosen.load_dequantized(folder, Machine())
    compare_paths(engine, plain, calibration_text()[:2], 0.005)
    model: Any = engine.model
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_matrices_that_nothing_can_scale_are_said(tmp_path: Path) -> None:
    (note,) = quantized(method(), "llama_gqa", tmp_path / "artefact").notes
    assert "2 of 14 matrices" in note
    assert note.endswith(": self_attn.o_proj")


def test_a_block_may_be_kept_whole(tmp_path: Path) -> None:
    chosen, folder = method(keep=["*.0.*"]), tmp_path / "artefact"
    assert len(quantized(chosen, "llama", folder).quantized) == 7
    found = load_file(folder / WEIGHTS)
    stored = build("llama").get_submodule(f"{BLOCK}self_attn.v_proj").weight.half()
    assert torch.equal(found[f"{BLOCK}self_attn.v_proj.weight"], stored)


def test_a_scale_through_what_is_not_linear_is_refused(tmp_path: Path) -> None:
    """GPT-NeoX has GELU between two matrices that GPTQModel thinks next to each other."""
    with pytest.raises(ConfigError, match="changes what GPTNeoXForCausalLM computes before"):
        quantized(method(), "gpt_neox", tmp_path / "artefact")
    assert not (tmp_path / "artefact").exists()


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"group_size": 256}, Machine(), "group_size is 256; awq takes 16, 32, 64, 128, -1"),
        ({"backend": "gemm"}, Machine(), "it must be one of auto, torch, exllama_v2, marlin"),
        ({"zero_point": 1}, Machine(), "method.zero_point of awq is 1; it must be true or false"),
        ({"backend": "exllama_v2"}, Machine(), "is a CUDA kernel, and hardware.device is 'cpu'"),
        ({}, Machine(compute_dtype="float16"), "use 'float32' or 'bfloat16'"),
        ({"group_size": 16}, Machine(allow_fallback=False), "not for 4 bits with group_size 16"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("gpt2", "is a Conv1D, which GPTQModel cannot scale for AWQ; use method=gptq"),
        ("mixtral", "is a stack of experts"),
    ],
)
def test_models_that_do_not_fit_are_refused(kind: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        method().select(build(kind))


def test_rows_that_cannot_be_clipped_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96)
    with pytest.raises(ConfigError, match="has 96 rows; AWQ in GPTQModel takes multiples of 64"):
        method().select(model)


def test_the_yaml_builds_the_method() -> None:
    axes = {"seed": 7, "group_size": 32}
    node = OmegaConf.merge(axes, {"method": OmegaConf.load(CONF / "awq.yaml")})
    built = instantiate(node.method)
    assert built.calibration.seed == 7
    assert built == method(calibration=built.calibration)
    assert built.bits == 4
