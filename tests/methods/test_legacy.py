"""auto_gptq and auto_awq: jobs, files and errors with a stand-in; AutoAWQ itself where it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from kernels.errors import ConfigError
from methods import legacy
from methods.base import Calibration, QuantizeReport
from methods.gptq_format import decode_awq, decode_gptq
from methods.legacy import PROJECT, AutoAWQ, AutoGPTQ, older_config
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import VOCABULARY, tiny_ids, tiny_tokenizer
from tests.methods.gptq_models import (
    WEIGHTS,
    build,
    inputs_of,
    logits,
    parts_of,
    spoil,
    stored_bits,
)
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
CALIBRATION = Calibration(samples=8, seq_len=32, seed=0)
UP = "model.layers.0.mlp.up_proj"
ENVIRONMENT = ".venv-legacy"

needs_environment = pytest.mark.skipif(
    not (PROJECT / ENVIRONMENT / "bin" / "python").exists(),
    reason="no environment of the archived libraries; make it: make legacy-env",
)


def awq(environment: str | Path = ENVIRONMENT, **options: Any) -> AutoAWQ:
    return AutoAWQ(
        "auto_awq",
        options.pop("group_size", 32),
        CALIBRATION,
        environment=str(environment),
        **options,
    )


def gptq(environment: str | Path = ENVIRONMENT, **options: Any) -> AutoGPTQ:
    return AutoGPTQ(
        "auto_gptq",
        options.pop("bits", 4),
        options.pop("group_size", 32),
        CALIBRATION,
        environment=str(environment),
        **options,
    )


def calibration_text() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (8, 32), generator=generator)


def run(chosen: AutoAWQ | AutoGPTQ, model: Any, folder: Path) -> QuantizeReport:
    report = chosen.quantize(model, None, calibration_text(), folder)
    # As a cell does it; GPTQModel loads no folder without one.
    tiny_tokenizer().save_pretrained(folder)
    return report


def interpreter(folder: Path, line: str) -> Path:
    """Return an environment in `folder` whose Python is a shell script of one `line`."""
    path = folder / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = Path(__file__).with_name("legacy_stand_in.py")
    folder = tmp_path_factory.mktemp("environment")
    return interpreter(folder / "own", f'exec "{sys.executable}" "{script}" "$@"')


@pytest.fixture(scope="module")
def exchanged(
    stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizeReport]:
    folder = tmp_path_factory.mktemp("exchanged")
    return folder, run(gptq(stand_in), build("llama_tied"), folder)


def test_a_job_goes_out_and_a_checkpoint_comes_back(exchanged: tuple[Path, QuantizeReport]) -> None:
    folder, report = exchanged
    assert report.stored_bits == stored_bits(folder, report)
    tensors = load_file(folder / WEIGHTS)
    assert "lm_head.weight" not in tensors
    floats = {t.dtype for name, t in tensors.items() if t.is_floating_point()}
    assert floats == {torch.float16}
    config = json.loads((folder / "config.json").read_text())
    # Our own, not the older one that the child was given.
    assert config["rope_parameters"]["rope_type"] == "default"
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_the_checkpoint_is_run_and_compared(exchanged: tuple[Path, QuantizeReport]) -> None:
    folder, report = exchanged
    engine = gptq().load(folder, Machine())
    plain = gptq().load_dequantized(folder, Machine())
    compare_paths(engine, plain, tiny_ids(), gptq().path_tolerance)
    assert {use.execution for use in engine.kernels()} == {"packed"}
    assert {use.name for use in engine.kernels()} == {matrix.name for matrix in report.quantized}
    weight = build("llama_tied").get_submodule(UP).weight.detach()
    decoded = decode_gptq(parts_of(folder, UP), "gptq")
    step = weight.reshape(weight.shape[0], -1, 32).abs().amax(-1, keepdim=True) / 7
    assert float(((decoded - weight).reshape(*step.shape[:2], -1) / step).abs().max()) < 0.51


def test_a_damaged_checkpoint_is_caught(
    exchanged: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    for path in exchanged[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path, f"{UP}.qweight")
    engine = gptq().load(exchanged[0], Machine())
    with pytest.raises(PathDisagreementError, match="differ by"):
        compare_paths(
            engine,
            gptq().load_dequantized(tmp_path, Machine()),
            tiny_ids(),
            gptq().path_tolerance,
        )


@pytest.mark.parametrize("chosen", [awq, gptq])
def test_without_the_environment_one_sentence_says_what_makes_it(
    chosen: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="none at nowhere; make it: make legacy-env") as caught:
        run(chosen("nowhere"), build("llama"), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("echo warning >&2; echo 'ValueError: too narrow' >&2; exit 3", "ended with 3: ValueErr"),
        ("exit 1", "ended with 1: it said nothing"),
        ("kill -9 $$", "ended with -9: it said nothing"),
    ],
)
@pytest.mark.parametrize("chosen", [awq, gptq])
def test_a_child_that_fails_is_one_sentence(
    chosen: Any, line: str, sentence: str, tmp_path: Path
) -> None:
    environment = interpreter(tmp_path / "environment", line)
    (tmp_path / "into").mkdir()
    with pytest.raises(RuntimeError, match=sentence) as caught:
        run(chosen(environment), build("llama"), tmp_path / "into")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "into").iterdir())


def test_the_child_does_not_see_our_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    line = 'echo "path=$PYTHONPATH offline=$HF_HUB_OFFLINE" >&2; exit 1'
    with pytest.raises(RuntimeError, match="path= offline=1"):
        run(awq(interpreter(tmp_path / "own", line)), build("llama"), tmp_path)


def test_configurations_for_the_older_transformers() -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    older = older_config({"dtype": "float16", "rope_parameters": scaled, "vocab_size": 5})
    assert older == {
        "torch_dtype": "float16",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "vocab_size": 5,
    }
    plain = older_config(
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        }
    )
    assert plain == {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5}
    assert older_config({"n_embd": 64}) == {"n_embd": 64}
    with pytest.raises(ConfigError, match="differs between layers"):
        older_config({"rope_parameters": {"full_attention": scaled}})


@pytest.mark.parametrize(
    ("chosen", "options", "sentence"),
    [
        (gptq, {"bits": 5}, "bits is 5; auto_gptq has 2, 3, 4 and 8"),
        (gptq, {"damping": 0}, "method.damping is 0; it must be between 0 and 1"),
        (gptq, {"act_order": 1}, "method.act_order of auto_gptq is 1; it must be true or false"),
        (gptq, {"group_size": 48}, "group_size is 48; auto_gptq takes 16, 32"),
        (awq, {"group_size": 256}, "group_size is 256; auto_awq takes 16, 32, 64, 128, -1"),
        (awq, {"clip": "no"}, "method.clip of auto_awq is 'no'; it must be true or false"),
    ],
)
def test_bad_options_are_one_sentence(chosen: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        chosen(**options)


def test_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="quantizes on CUDA only, and torch sees no CUDA card"):
        gptq().check(Machine())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gptq().check(Machine())
    with pytest.raises(ConfigError, match="packed kernel for 4 bits"):
        gptq(bits=3).check(Machine(allow_fallback=False))
    awq().check(Machine())
    with pytest.raises(ConfigError, match="is a CUDA kernel"):
        awq(backend="marlin").check(Machine())


@pytest.mark.parametrize("chosen", [awq, gptq])
@pytest.mark.parametrize(
    ("kind", "group_size", "sentence"),
    [
        ("mixtral", 32, "stack of experts"),
        ("gpt2", 32, "transposed Conv1D"),
        ("llama", 128, "not a multiple of group_size 128"),
    ],
)
def test_models_without_a_form(chosen: Any, kind: str, group_size: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        chosen(group_size=group_size).select(build(kind))


@pytest.mark.parametrize("name", ["auto_awq", "auto_gptq"])
def test_the_yaml_builds_the_method(name: str) -> None:
    axes = {"seed": 7, "bits": 4, "group_size": 64}
    node = OmegaConf.merge(axes, {"method": OmegaConf.load(CONF / f"{name}.yaml")})
    built = instantiate(node.method)
    assert (built.bits, built.group_size, built.calibration.seed) == (4, 64, 7)
    assert built.environment == ENVIRONMENT


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizeReport]:
    folder = tmp_path_factory.mktemp("searched")
    return folder, run(awq(), build("qwen2"), folder)


def rounded(weight: Tensor, group_size: int = 32) -> Tensor:
    """Return the nearest levels of AutoAWQ's grid to a weight [out, in]."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).half().float()
    zero_point = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale).round() + zero_point).clamp(0, 15)
    return ((codes - zero_point) * scale).reshape(weight.shape)


@needs_environment
def test_autoawq_is_no_worse_than_rtn(searched: tuple[Path, QuantizeReport]) -> None:
    """It was twelve times worse with the library's own search, which a CPU's `.cpu()` breaks."""
    model, text = build("qwen2"), calibration_text()
    expected = logits(model, text)
    plain = awq().load_dequantized(searched[0], Machine())
    found = divergence(expected, plain.prefill(text)[0])
    with torch.no_grad():
        for matrix in searched[1].quantized:
            linear: Any = model.get_submodule(matrix.name)
            linear.weight.copy_(rounded(linear.weight))
    assert 0 < found < divergence(expected, logits(model, text))


@needs_environment
def test_autoawqs_scales_leave_the_function_alone(searched: tuple[Path, QuantizeReport]) -> None:
    """What a norm hands out is divided by what the matrices behind it are multiplied by."""
    model = build("qwen2")
    other: Any = awq().load_dequantized(searched[0], Machine())
    x, y = (inputs_of(m, UP, calibration_text()) for m in (model, other.model))
    weight = model.get_submodule(UP).weight.detach()
    decoded = decode_awq(parts_of(searched[0], UP), "gemm")
    assert not torch.allclose(decoded, weight, atol=0.05)
    error = (y @ decoded.T - x @ weight.T).square().mean() / (x @ weight.T).square().mean()
    assert float(error) < 0.1


@needs_environment
def test_autoawq_there_and_back(searched: tuple[Path, QuantizeReport], tmp_path: Path) -> None:
    folder, report = searched
    assert "copies of the weights" in report.notes[0]
    assert report.stored_bits == stored_bits(folder, report)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    engine = awq().load(folder, Machine())
    plain = awq().load_dequantized(folder, Machine())
    compare_paths(engine, plain, tiny_ids(), awq().path_tolerance)
    run(awq(), build("qwen2"), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@needs_environment
def test_a_model_that_is_read_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `older_config` the older transformers takes another rotary embedding silently."""
    drawn = build("llama")
    drawn.config.rope_parameters["rope_theta"] = 100.0
    model = type(drawn)(drawn.config).eval()
    model.load_state_dict(drawn.state_dict())
    monkeypatch.setattr(legacy, "older_config", dict)
    with pytest.raises(RuntimeError, match="reads this model otherwise than the version"):
        run(awq(), model, tmp_path)


@needs_environment
@pytest.mark.skipif(torch.cuda.is_available(), reason="AutoGPTQ would quantize here")
def test_autogptq_itself_wants_a_card(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"quantize_gptq.py.*requires CUDA"):
        run(gptq(), build("llama"), tmp_path)
