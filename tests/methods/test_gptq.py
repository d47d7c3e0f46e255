"""gptq: GPTQModel's results against plain GPTQ and OBQ, and the way through an artefact."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from kernels.errors import ConfigError
from methods.gptq import GPTQ
from methods.gptq_format import decode_gptq, matrices, scheme_of, unpack
from methods.gptqmodel_engine import PATH_TOLERANCE
from methods.gptqmodel_quantize import _check_text
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import tiny_tokenizer
from tests.methods import gptq_reference as reference
from tests.methods.gptq_models import (
    CALIBRATION,
    WEIGHTS,
    build,
    calibration_text,
    inputs_of,
    logits,
    parts_of,
    quantized,
    spoil,
    stored_bits,
)
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
FIRST = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]

WITHIN = 0.01
"""Share of the reference's layer error by which the library's may differ (float32 against 64)."""


def method(**options: Any) -> GPTQ:
    return GPTQ("gptq", **{"calibration": CALIBRATION, "bits": 4, "group_size": 32, **options})


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channel": {"bits": 3, "group_size": -1},
    "symmetric": {"bits": 3, "symmetric": True},
    "act_order": {"bits": 2, "group_size": 16, "act_order": True},
    "damping": {"damping": 0.5},
    "eight": {"bits": 8, "group_size": 64},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return name of OPTIONS -> folder of the artefact of the llama."""
    folders = {}
    for name, options in OPTIONS.items():
        folders[name] = tmp_path_factory.mktemp(name) / "artefact"
        quantized(method(**options), "llama", folders[name])
    return folders


@pytest.mark.parametrize("name", OPTIONS)
def test_layer_error_is_that_of_plain_gptq_and_below_rtn(name: str, made: dict[str, Path]) -> None:
    """The first block's queries, keys and values see inputs that no rounding has changed."""
    chosen, model = method(**OPTIONS[name]), build("llama")
    x = inputs_of(model, FIRST[0], calibration_text())
    h = reference.hessian(x)
    for layer in FIRST:
        weight = model.get_submodule(layer).weight.detach()
        stored = decode_gptq(parts_of(made[name], layer), scheme_of(made[name]).version)
        plain = reference.gptq(
            weight,
            h,
            chosen.bits,
            chosen.group_size,
            chosen.symmetric,
            chosen.damping,
            chosen.act_order,
        )
        nearest = reference.rtn(weight, chosen.bits, chosen.group_size, chosen.symmetric)
        error = reference.output_error(weight, stored, x)
        assert error == pytest.approx(reference.output_error(weight, plain, x), rel=WITHIN)
        assert error < 0.9 * reference.output_error(weight, nearest, x)
        # Rounding to nearest, handed back as GPTQ, would move no weight from its nearest level.
        step = float((nearest - weight).abs().max())
        assert float(((stored - nearest).abs() > step / 2).float().mean()) > 0.05


def test_greedy_obq_beside_it(made: dict[str, Path]) -> None:
    """GPTQ gives up OBQ's order of the weights, which costs little (its paper, section 3)."""
    model = build("llama")
    x = inputs_of(model, FIRST[0], calibration_text())
    weight = model.get_submodule(FIRST[0]).weight.detach()
    stored = decode_gptq(parts_of(made["channel"], FIRST[0]), "gptq_v2")
    greedy = reference.obq(weight, reference.hessian(x), bits=3)
    nearest = reference.rtn(weight, 3, -1, symmetric=False)
    errors = [reference.output_error(weight, q, x) for q in (greedy, stored, nearest)]
    assert errors[0] < 0.7 * errors[2]
    assert errors[1] < 1.5 * errors[0]


def test_the_whole_model_is_better_than_rounded_to_nearest(made: dict[str, Path]) -> None:
    ids = calibration_text()
    model = build("llama")
    expected = logits(model, ids)
    engine = method(**OPTIONS["channel"]).load(made["channel"], Machine())
    with torch.no_grad():
        for matrix in matrices(made["channel"]):
            weight = model.get_submodule(matrix.name).weight
            weight.copy_(reference.rtn(weight, 3, -1, symmetric=False))
    nearest = divergence(expected, logits(model, ids))
    assert divergence(expected, engine.prefill(ids)[0]) < 0.7 * nearest


def test_the_options_are_what_is_stored(made: dict[str, Path]) -> None:
    plain = parts_of(made["plain"], FIRST[0])
    assert not torch.equal(plain["qweight"], parts_of(made["damping"], FIRST[0])["qweight"])
    ordered = parts_of(made["act_order"], FIRST[0])["g_idx"]
    assert not torch.equal(ordered, ordered.sort().values)
    assert torch.equal(plain["g_idx"], torch.arange(64, dtype=torch.int32) // 32)
    # Version 1 of the format stores zero points less 1.
    assert set(unpack(parts_of(made["symmetric"], FIRST[0])["qzeros"], 3).flatten().tolist()) == {3}
    assert len(set(unpack(plain["qzeros"], 4).flatten().tolist())) > 3
    schemes = {name: scheme_of(folder) for name, folder in made.items()}
    assert schemes["symmetric"].version == "gptq"
    assert schemes["plain"].version == "gptq_v2"
    assert (schemes["act_order"].bits, schemes["act_order"].group_size) == (2, 16)


def test_the_same_inputs_give_the_same_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    quantized(method(), "llama", tmp_path / "again")
    names = {path.name for path in made["plain"].iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (made["plain"] / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("name", OPTIONS)
def test_stored_bits_are_the_bits_on_disk(name: str, made: dict[str, Path]) -> None:
    chosen, model = method(**OPTIONS[name]), build("llama")
    selected, _ = chosen.select(model)
    assert [m.name for m in selected] == [
        m.name for m in sorted(matrices(made[name]), key=lambda m: selected.index(m))
    ]
    tensors = load_file(made[name] / WEIGHTS)
    for matrix in selected:
        parts = parts_of(made[name], matrix.name)
        assert sum(8 * tensor.nbytes for tensor in parts.values()) == chosen.stored_bits(matrix)
    # What is not quantized is what the checkpoint held, and in its type.
    assert torch.equal(
        tensors["model.embed_tokens.weight"], model.get_input_embeddings().weight.half()
    )
    config = json.loads((made[name] / "config.json").read_text())
    assert (config["dtype"], config["pad_token_id"]) == ("float16", None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_and_decoded_weights_agree(name: str, dtype: str, made: dict[str, Path]) -> None:
    chosen, machine = method(**OPTIONS[name]), Machine(compute_dtype=dtype)
    engine = chosen.load(made[name], machine)
    decoded = chosen.load_dequantized(made[name], machine)
    compare_paths(engine, decoded, calibration_text()[:2], chosen.path_tolerance)
    uses = engine.kernels()
    assert {use.name for use in uses} == {matrix.name for matrix in matrices(made[name])}
    packed = chosen.bits == 4 and chosen.group_size == 32
    assert {use.execution for use in uses} == {"packed" if packed else "dequantized"}
    assert {use.layer for use in uses} == {"TorchAtenLinear" if packed else "TorchLinear"}
    assert all(("_weight_int4pack_mm_for_cpu in bfloat16" in use.kernel) == packed for use in uses)
    model: Any = engine.model
    assert model.model.norm.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", ["plain", "symmetric"])
def test_a_broken_weight_is_caught(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(made[name], broken)
    spoil(broken, f"{FIRST[2]}.qzeros")
    chosen = method(**OPTIONS[name])
    engine = chosen.load(broken, Machine())
    decoded = chosen.load_dequantized(made[name], Machine())
    with pytest.raises(PathDisagreementError):
        compare_paths(engine, decoded, calibration_text()[:2], PATH_TOLERANCE)


def test_an_artefact_can_be_moved_and_loads_alike(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["plain"], tmp_path / "moved")
    one, other = (method().load(at, Machine()) for at in (made["plain"], tmp_path / "moved"))
    assert torch.equal(one.prefill(calibration_text())[0], other.prefill(calibration_text())[0])


def test_backend_torch_converts_at_each_call(made: dict[str, Path]) -> None:
    chosen = method(backend="torch")
    engine = chosen.load(made["plain"], Machine())
    assert {(use.layer, use.execution) for use in engine.kernels()} == {
        ("TorchLinear", "dequantized")
    }
    decoded = chosen.load_dequantized(made["plain"], Machine())
    compare_paths(engine, decoded, calibration_text()[:2], 0.002)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama_gqa", torch.float16),
        ("llama_tied", torch.float16),
        ("qwen2", torch.bfloat16),
        ("gpt2", torch.float32),
    ],
)
def test_other_architectures(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tied embeddings, biases, GPT-2's transposed matrices; checkpoints in other types."""
    chosen = method(bits=8, group_size=-1)
    expected = logits(build(kind, dtype), calibration_text()[:2])
    report = quantized(chosen, kind, tmp_path / "artefact", dtype=dtype)
    engine = chosen.load(tmp_path / "artefact", Machine())
    found = engine.prefill(calibration_text()[:2])[0]
    assert divergence(expected, found) < 1e-3
    assert report.stored_bits == stored_bits(tmp_path / "artefact", report)
    assert any("biases" in note for note in report.notes) == (kind in ("qwen2", "gpt2"))
    decoded = chosen.load_dequantized(tmp_path / "artefact", Machine())
    compare_paths(engine, decoded, calibration_text()[:2], 0.002)
    model: Any = engine.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == (kind != "llama_gqa")
    # The library loads 16 bits; what the checkpoint holds in more is not lost.
    assert torch.equal(embedding, build(kind, dtype).get_input_embeddings().weight)


def test_kept_matrices_stay_float(tmp_path: Path) -> None:
    chosen = method(keep=["*.down_proj", "*.0.*.q_proj"])
    report = quantized(chosen, "llama", tmp_path / "artefact")
    engine = chosen.load(tmp_path / "artefact", Machine())
    assert len(report.quantized) == 14 - 3
    model: Any = engine.model
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(model.model.layers[1].self_attn.q_proj) is not nn.Linear
    decoded = chosen.load_dequantized(tmp_path / "artefact", Machine())
    compare_paths(engine, decoded, calibration_text()[:2], PATH_TOLERANCE)


def entry(**changed: str) -> dict[str, str]:
    said = {"layer": "0", "module": "q", "loss": "0.1", "samples": "576", "damp": "0.01000"}
    return {**said, **changed}


@pytest.mark.parametrize(
    "loss", ["999999999.0000000000", "rtn fallback", "fallback(rtn): 0.1", "nan"]
)
def test_a_matrix_that_the_library_rounded_to_nearest_is_an_error(loss: str) -> None:
    with pytest.raises(RuntimeError, match="rounded layer 0 q to nearest"):
        method()._damping_notes([entry(), entry(loss=loss)])


def test_raised_damping_is_a_note() -> None:
    assert method()._damping_notes([entry()]) == []
    (note,) = method()._damping_notes([entry(), entry(damp="0.03000")])
    assert "1 Hessians" in note
    assert "0.03" in note


def test_text_that_the_library_drops_is_an_error() -> None:
    _check_text([entry()], calibration_text())
    with pytest.raises(RuntimeError, match="528 of 576 calibration tokens"):
        _check_text([entry(samples="528")], calibration_text())


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"bits": 5}, Machine(), "bits is 5; gptq takes 2, 3, 4, 8"),
        ({"group_size": 24}, Machine(), "group_size is 24; gptq takes 16, 32, .*-1 "),
        ({"damping": 0}, Machine(), "method.damping is 0; it must be between 0 and 1"),
        ({"backend": "cuda"}, Machine(), "it must be one of auto, torch, exllama_v2, marlin"),
        ({"act_order": 1}, Machine(), "method.act_order of gptq is 1; it must be true or false"),
        ({"keep": "*.q"}, Machine(), "it must be a list"),
        ({"backend": "marlin"}, Machine(), "is a CUDA kernel, and hardware.device is 'cpu'"),
        ({}, Machine(compute_dtype="float16"), "use 'float32' or 'bfloat16'"),
        ({"bits": 3}, Machine(allow_fallback=False), "not for 3 bits with group_size 32"),
        ({"backend": "torch"}, Machine(allow_fallback=False), "and backend=torch"),
        ({}, Machine("cuda", "float32"), "CUDA kernels take 'float16' or 'bfloat16'"),
        ({"backend": "marlin"}, Machine("cuda", "float16"), "4 or 8 bits with symmetric=true"),
        (
            {"backend": "exllama_v2", "bits": 8},
            Machine("cuda", "float16"),
            "exllama_v2 takes 4 bits, not 8",
        ),
        (
            {"backend": "torch"},
            Machine("cuda", "float16", allow_fallback=False),
            "converts the weights at each call",
        ),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


def test_good_options_pass() -> None:
    method().check(Machine(allow_fallback=False))
    method(symmetric=True, backend="marlin").check(Machine("cuda", "bfloat16"))


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (
            "llama",
            {"group_size": 128},
            "width 64 is not a multiple of group_size 128; .* 16, 32, 64",
        ),
        ("mixtral", {}, "is a stack of experts, which GPTQModel takes apart"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    kind: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        method(**options).select(build(kind))


def test_widths_that_cannot_be_packed_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 136)
    with pytest.raises(ConfigError, match="packs both widths in multiples of 32; keep it"):
        method().select(model)


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    text, tokenizer, into = calibration_text(), tiny_tokenizer(), tmp_path / "artefact"
    with pytest.raises(ConfigError, match="needs calibration text"):
        method().quantize(build("llama"), tokenizer, None, into)
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        method().quantize(build("llama"), None, text, into)
    strange = build("llama")
    strange.config.model_type = "strange"
    with pytest.raises(ConfigError, match="no definition for models of type 'strange'"):
        method().quantize(strange, tokenizer, text, into)
    broken = build("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="NaN"):
        method().quantize(broken, tokenizer, text, into)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_one_sentence(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "methods.library.find_spec", lambda name: None if name == "gptqmodel" else find(name)
    )
    for call in (
        lambda: quantized(method(), "llama", tmp_path / "artefact"),
        lambda: method().load(made["plain"], Machine()),
    ):
        with pytest.raises(ConfigError, match=r"pip install .* gptqmodel"):
            call()


def test_the_yaml_builds_the_method() -> None:
    axes = {"seed": 7, "bits": 3, "group_size": 32}
    node = OmegaConf.merge(axes, {"method": OmegaConf.load(CONF / "gptq.yaml")})
    built = instantiate(node.method)
    assert built.calibration.seed == 7
    assert built == method(calibration=built.calibration, bits=3)
