"""auto_round: without tuning round-to-nearest, with it no worse, and the way to disk and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from harness.measures.size import TOKENIZER_FILES
from kernels.errors import ConfigError
from methods import library
from methods.auto_round import AutoRound
from methods.base import Calibration, QuantizeReport
from methods.gptq_format import decode_awq, decode_gptq
from methods.packed import PathDisagreementError, compare_paths
from tests.architectures import VOCABULARY, tiny_ids, tiny_tokenizer
from tests.methods.gptq_models import WEIGHTS, build, logits, parts_of, spoil, stored_bits
from tests.methods.int8_models import divergence
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf" / "method"
CALIBRATION = Calibration(samples=8, seq_len=32, seed=0)
UP = "model.layers.0.mlp.up_proj"
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytest.importorskip("auto_round", reason="the optional package auto-round is not installed")


def method(bits: int = 4, group_size: int = 32, iterations: int = 0, **options: Any) -> AutoRound:
    return AutoRound("auto_round", bits, group_size, CALIBRATION, iterations=iterations, **options)


def calibration_text() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (8, 32), generator=generator)


def run(chosen: AutoRound, kind: str, folder: Path) -> QuantizeReport:
    report = chosen.quantize(build(kind), None, calibration_text(), folder)
    # As a cell does it; GPTQModel loads no folder without one.
    tiny_tokenizer().save_pretrained(folder)
    return report


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Iterations -> artefact of the Llama with tied embeddings, 3 bits."""
    folders = {}
    for iterations in (0, 12):
        folders[iterations] = tmp_path_factory.mktemp(f"symmetric{iterations}")
        run(method(3, iterations=iterations), "llama_tied", folders[iterations])
    return folders


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizeReport]:
    folder = tmp_path_factory.mktemp("asymmetric")
    return folder, run(method(symmetric=False, keep=["*.down_proj"]), "qwen2", folder)


def grouped(kind: str) -> Tensor:
    weight: Tensor = build(kind).get_submodule(UP).weight.detach()
    return weight.reshape(weight.shape[0], -1, 32)


def test_without_tuning_symmetric_is_rtn(symmetric: dict[int, Path]) -> None:
    weight = grouped("llama_tied")
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    largest = torch.where(-low > high, low, high)
    # Not a half of the range: the largest weight is -4 steps, whatever its sign.
    scale = (-largest / 4).half().float()
    expected = (weight / scale).round().clamp(-4, 3) * scale
    found = decode_gptq(parts_of(symmetric[0], UP), "gptq")
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-6, atol=1e-7)


def test_without_tuning_asymmetric_is_rtn(asymmetric: tuple[Path, QuantizeReport]) -> None:
    weight = grouped("qwen2")
    low = weight.amin(-1, keepdim=True).clamp(max=0)
    scale = ((weight.amax(-1, keepdim=True).clamp(min=0) - low) / 15).half().float()
    zero_point = (-low / scale).round()
    codes = ((weight / scale).round() + zero_point).clamp(0, 15)
    found = decode_awq(parts_of(asymmetric[0], UP), "gemm")
    expected = ((codes - zero_point) * scale).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_tuning_is_no_worse_than_rtn_on_its_text(symmetric: dict[int, Path]) -> None:
    model = build("llama_tied")
    first = model.model.layers[0]
    seen: list[tuple[Any, Any]] = []
    handle = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    logits(model, calibration_text())
    handle.remove()
    args, kwargs = seen[0]
    errors = {}
    with torch.no_grad():
        expected = first(*args, **kwargs)
        for iterations, folder in symmetric.items():
            other: Any = method(3).load_dequantized(folder, Machine())
            output = other.model.model.layers[0](*args, **kwargs)
            errors[iterations] = float((output - expected).square().mean())
    assert errors[12] < errors[0]


def test_iterations_change_codes_and_scales(symmetric: dict[int, Path]) -> None:
    one, other = (parts_of(symmetric[iterations], UP) for iterations in (0, 12))
    assert not torch.equal(one["qweight"], other["qweight"])
    assert not torch.equal(one["scales"], other["scales"])


def test_the_same_again_is_the_same_file(symmetric: dict[int, Path], tmp_path: Path) -> None:
    run(method(3, iterations=12), "llama_tied", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (symmetric[12] / WEIGHTS).read_bytes()


def test_what_lies_in_the_artefact(
    symmetric: dict[int, Path], asymmetric: tuple[Path, QuantizeReport]
) -> None:
    matrices, left_out = method(3).select(build("llama_tied"))
    report = QuantizeReport(matrices, sum(method(3).stored_bits(m) for m in matrices), left_out)
    assert report.stored_bits == stored_bits(symmetric[12], report)
    assert {matrix.name.rpartition(".")[2] for matrix in matrices} == set(MATRICES)
    folder, report = asymmetric
    assert report.stored_bits == stored_bits(folder, report)
    stored = load_file(folder / WEIGHTS)
    # The model's own type for all but the scales; the kept matrix is as it was.
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float16
    assert stored["model.layers.0.self_attn.q_proj.bias"].dtype == torch.float16
    assert stored["model.embed_tokens.weight"].dtype == torch.float16
    assert not [name for name in stored if "g_idx" in name or "lm_head" in name]
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.json", "generation_config.json", WEIGHTS}
    assert files <= TOKENIZER_FILES | {"config.json", "generation_config.json", WEIGHTS}


def test_paths_agree_and_rows_say_what_runs(
    symmetric: dict[int, Path], asymmetric: tuple[Path, QuantizeReport]
) -> None:
    for chosen, folder, kind, execution in (
        (method(3), symmetric[12], "llama_tied", "dequantized"),
        (method(symmetric=False, keep=["*.down_proj"]), asymmetric[0], "qwen2", "packed"),
    ):
        engine = chosen.load(folder, Machine())
        plain = chosen.load_dequantized(folder, Machine())
        assert {use.execution for use in engine.kernels()} == {execution}
        compare_paths(engine, plain, tiny_ids(), chosen.path_tolerance)
        model = build(kind)
        assert divergence(logits(model, tiny_ids()), engine.prefill(tiny_ids())[0]) < 0.2
        assert {use.name for use in engine.kernels()} == {m.name for m in chosen.select(model)[0]}


def test_a_damaged_weight_is_caught(
    asymmetric: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    chosen = method(symmetric=False, keep=["*.down_proj"])
    engine = chosen.load(asymmetric[0], Machine())
    for path in asymmetric[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path, f"{UP}.qweight")
    with pytest.raises(PathDisagreementError, match="differ by"):
        compare_paths(
            engine, chosen.load_dequantized(tmp_path, Machine()), tiny_ids(), chosen.path_tolerance
        )


def test_pytorch_is_left_as_it_was(symmetric: dict[int, Path]) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    assert repr(torch.tensor([0.123456])) == "tensor([0.1235])"


@pytest.mark.parametrize(
    ("options", "machine", "sentence"),
    [
        ({"bits": 5}, Machine(), "bits is 5; auto_round has 2, 3, 4, 8"),
        ({"bits": 3, "symmetric": False}, Machine(), "AWQ format, which has 4 bits only"),
        ({"group_size": 48}, Machine(), "group_size is 48; auto_round takes 16, 32"),
        ({"iterations": -1}, Machine(), "method.iterations is -1; it must be 0 or more"),
        ({"symmetric": "no"}, Machine(), "method.symmetric of auto_round is 'no'"),
        ({"backend": "fast"}, Machine(), "method.backend of auto_round is 'fast'; it must be"),
        ({"bits": 8}, Machine(allow_fallback=False), "packed kernel for 4 bits"),
    ],
)
def test_refusals_are_one_sentence(
    options: dict[str, Any], machine: Machine, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        method(**options).check(machine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "group_size", "sentence"),
    [
        ("mixtral", 32, "stack of experts"),
        ("gpt2", 32, "transposed Conv1D, for which auto_round has no form"),
        ("llama", 128, "is not a multiple of group_size 128"),
    ],
)
def test_models_without_a_form(kind: str, group_size: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        method(group_size=group_size).select(build(kind))


@pytest.mark.parametrize("calibration", [None, torch.zeros(0, 32, dtype=torch.int64)])
def test_without_text_it_refuses(calibration: Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs calibration text"):
        method().quantize(build("llama"), None, calibration, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    method().check(Machine())
    with pytest.raises(ConfigError, match=r"needs the package auto_round.*pip install"):
        run(method(), "llama", tmp_path)


def test_the_yaml_builds_the_method() -> None:
    node = OmegaConf.merge(
        {"seed": 7, "bits": 3, "group_size": 64},
        {"method": OmegaConf.load(CONF / "auto_round.yaml")},
    )
    built = instantiate(node.method)
    assert (built.bits, built.group_size, built.calibration.seed) == (3, 64, 7)
    assert built.iterations == 50
