"""mixed: plans by patterns and under budgets, artefacts bit for bit, and bad options."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.allocation import Budget
from methods.artefact import LAYERS
from methods.awq import AWQ
from methods.base import Calibration, LayerwiseMethod, QuantizeReport
from methods.gptq import GPTQ
from methods.linear import QuantizedModule
from methods.mixed import Mixed
from methods.packed import compare_paths
from methods.product_seconds import product_seconds
from methods.rtn import RTN
from tests.architectures import tiny, tiny_ids
from tests.methods import gptq_models
from tests.methods.layer_checks import bits_on_disk
from tests.methods.machine import Machine

CONF = Path(__file__).resolve().parents[2] / "conf"
CALIBRATION = Calibration(samples=2, seq_len=16, seed=0)
GROUP = 32


def rtn(bits: int, **options: Any) -> RTN:
    return RTN(f"rtn{bits}", bits, GROUP, **options)


def mixed(limit: dict[str, Any] | None = None, **options: Any) -> Mixed:
    candidates = {f"rtn{bits}": rtn(bits) for bits in (8, 4, 2)}
    given = {"candidates": candidates, "budget": Budget(**limit or {}), **options}
    return Mixed("mixed", CALIBRATION, **given)


def made(method: Mixed, into: Path, kind: str = "llama", dtype: Any = torch.float16) -> Any:
    """Return report and allocation of the tiny model, whose checkpoint is in `dtype`."""
    model = tiny(kind)
    model.config.dtype = dtype
    text = tiny_ids(2, 16) if method.needs_calibration else None
    report = method.quantize(model, None, text, into)
    return report, report.details["allocation"]


def plan(facts: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["candidate"] for row in facts["modules"]}


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, its = dict(one.named_buffers()), dict(other.named_buffers())
    return set(mine) == set(its) and all(torch.equal(mine[name], its[name]) for name in mine)


def test_it_is_a_method() -> None:
    method = mixed()
    assert (method.name, method.bits, method.group_size) == ("mixed", None, None)
    assert method.needs_calibration
    assert not mixed(rest="rtn4").needs_calibration


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_matrix_is_what_its_own_method_makes_of_it(kind: str, tmp_path: Path) -> None:
    method = mixed(keep=["last"], rules={"0": "rtn8"}, rest="rtn2")
    report, facts = made(method, tmp_path, kind)
    layers = json.loads((tmp_path / LAYERS).read_text())["layers"]
    model = tiny(kind)
    model.config.dtype = torch.float16
    first = [m for m in report.quantized if facts_of(facts, m.name)["block"] == 0]
    expected = rtn(8).modules(model, first, None)
    engine: Any = method.load_dequantized(tmp_path, Machine())
    assert set(layers) == set(expected)
    for name, module in expected.items():
        assert same(engine.model.get_submodule(name), module)
    kept = [m for m in report.quantized if m.name not in expected]
    assert {facts_of(facts, m.name)["candidate"] for m in kept} == {"unquantized"}
    used = {use.name: use for use in engine.kernels()}
    assert set(used) == {m.name for m in report.quantized}
    assert sum(use.weights for use in used.values()) == sum(m.weights for m in report.quantized)


def facts_of(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in facts["modules"] if row["name"] == name)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mixtral", "opt"])
def test_what_is_stored_is_what_is_said(kind: str, tmp_path: Path) -> None:
    report, facts = made(mixed({"average_bits": 7.0}), tmp_path, kind)
    weights = sum(matrix.weights for matrix in report.quantized)
    assert bits_on_disk(report, tmp_path) == report.stored_bits
    assert facts["budget"]["reached"] == report.stored_bits / weights <= 7.0
    assert facts["budget"] | {"reached": None} == {
        "kind": "average_bits", "wanted": 7.0, "reached": None, "unit": "bits a weight"
    }  # fmt: skip
    codes = sum(row["bits"] * row["weights"] for row in facts["modules"]) / weights
    assert report.bits == codes < report.stored_bits / weights
    assert facts["predicted_kl"] == pytest.approx(sum(row["kl"] for row in facts["modules"]))
    assert facts["solver"]["gap"] == 0
    assert facts["noise_floor_kl"] < 1e-6


def test_more_bits_are_never_worse_and_a_loose_budget_leaves_all_as_it_was(tmp_path: Path) -> None:
    losses = []
    for bits in (2.6, 7.0, 16.0):
        report, facts = made(mixed({"average_bits": bits}), tmp_path / str(bits))
        losses.append(facts["predicted_kl"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == facts["mix_kl"] == 0
    assert set(plan(facts).values()) == {"unquantized"}
    assert "14 of 14 matrices in scope stay unquantized (float16)" in " ".join(report.notes)


def test_a_budget_of_bytes_and_a_rule_beside_it(tmp_path: Path) -> None:
    method = mixed({"bytes": 14000}, rules={"*.v_proj": "rtn8"}, unquantized=False)
    report, facts = made(method, tmp_path)
    assert report.stored_bits / 8 == facts["budget"]["reached"] <= 14000
    chosen = plan(facts)
    assert "unquantized" not in chosen.values()
    assert {chosen[name] for name in chosen if name.endswith("v_proj")} == {"rtn8"}


@pytest.mark.parametrize(
    ("budget", "least"),
    [({"average_bits": 2}, "2.5625 bits a weight"), ({"bytes": 100.0}, r"\d+ B")],
)
def test_a_budget_that_cannot_be_met(budget: dict[str, Any], least: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the smallest that its candidates can meet is {least}"):
        made(mixed(budget), tmp_path)


def test_a_budget_of_seconds(tmp_path: Path) -> None:
    """That it is met is arithmetic; which candidates are faster is the machine's matter."""
    report, facts = made(mixed({"decode_seconds": 10.0}, hardware=Machine()), tmp_path)
    assert 0 < facts["budget"]["reached"] < 10
    assert facts["budget"]["unit"] == "s"
    assert set(plan(facts).values()) == {"unquantized"}
    assert report.bits == 16
    with pytest.raises(ConfigError, match=r"can meet is .* s$"):
        made(mixed({"decode_seconds": 1e-12}, hardware=Machine()), tmp_path)
    with pytest.raises(ConfigError, match="is no linear map"):
        made(mixed({"decode_seconds": 1.0}, hardware=Machine()), tmp_path, "mixtral")


def test_a_timed_module_is_left_as_it_was() -> None:
    model = tiny("llama")
    (matrix, *_), _ = rtn(4).select(model)
    module = rtn(4).modules(model, [matrix], None)[matrix.name]
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    timed = product_seconds({"q": (module, 32), "plain": (nn.Linear(32, 32), 32)}, Machine())
    assert set(timed) == {"q", "plain"}
    assert all(seconds > 0 for seconds in timed.values())
    assert isinstance(module, QuantizedModule)
    assert module.packed is not None
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_the_packed_path_agrees_with_the_dequantized_one(tmp_path: Path) -> None:
    method = mixed(keep=["*.o_proj"], rules={"first": "rtn8", "*.up_proj": "rtn2"}, rest="rtn4")
    made(method, tmp_path)
    engines = method.load(tmp_path, Machine()), method.load_dequantized(tmp_path, Machine())
    found = compare_paths(*engines, tiny_ids(), method.path_tolerance)
    assert max(found.prefill, found.decode) < method.path_tolerance
    # Beside the packed matrices of several widths it reads the plain ones.
    assert engines[0].decoding.startswith("one C call a token")  # type: ignore[attr-defined]


def test_head_and_embedding_are_in_scope_where_asked(tmp_path: Path) -> None:
    wide = {"rtn8": rtn(8, head=True, embeddings=True), "rtn4": rtn(4)}
    method = mixed(candidates=wide, rules={"embedding": "rtn8"}, keep=["head"], rest="rtn4",
                   head=True, embeddings=True)  # fmt: skip
    report, facts = made(method, tmp_path, "llama_tied")
    assert bits_on_disk(report, tmp_path) == report.stored_bits
    assert plan(facts)["model.embed_tokens"] == "rtn8"
    assert plan(facts)["lm_head"] == "unquantized"
    assert "both are stored" in " ".join(report.notes)
    method.load(tmp_path, Machine()).prefill(tiny_ids())
    with pytest.raises(ConfigError, match="no candidate of method mixed takes lm_head: rtn4"):
        made(mixed(candidates=wide, rest="rtn4", head=True), tmp_path)
    with pytest.raises(ConfigError, match="head and embedding are one parameter"):
        made(mixed({"average_bits": 6}, candidates=wide, head=True), tmp_path, "llama_tied")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rest": "rtn3"}, "names the candidate 'rtn3' for 'rest'; there are rtn8, rtn4"),
        ({"rules": {0: "rtn5"}}, "names the candidate 'rtn5' for '0'"),
        ({"rest": "rtn4", "budget": Budget(bytes=5)}, "beside method.budget.bytes"),
        ({"budget": Budget(decode_seconds=1)}, r"add 'method.hardware=\$\{hardware\}'"),
        ({"keep": "first"}, "it must be a list"),
        ({"candidates": {"a8": rtn(8, activation_bits=8)}}, "set method.candidates.a8.activation"),
        ({"candidates": {"unquantized": rtn(8)}}, "take another"),
        ({"candidates": {"awq4": AWQ("awq", CALIBRATION)}}, "awq, whose matrices cannot be taken"),
        (
            {"candidates": {"o": GPTQ("gptq", CALIBRATION, act_order=True)}},
            "set .*.o.act_order=false",
        ),
        ({"candidates": {"g": GPTQ("gptq", CALIBRATION)}}, "set method.candidates.g.kernel=quantb"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        mixed(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": ["*.nothing"]}, r"keep pattern '\*\.nothing' matches no matrix of the model"),
        ({"rules": {"7": "rtn8"}}, "rule '7' matches no matrix .* block numbers 0 to 1"),
        ({"rules": {"head": "rtn8"}}, "rule 'head' matches no matrix"),
    ],
)
def test_patterns_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        mixed(rest="rtn4", **options).select(tiny("llama"))
    # Out of scope, so it stays as it was anyway.
    assert mixed(rest="rtn4", keep=["head", "embedding"]).select(tiny("llama"))[0]


def test_its_size_is_not_known_by_arithmetic() -> None:
    matrix = mixed().select(tiny("llama"))[0][0]
    with pytest.raises(ConfigError, match="is known when its plan is made"):
        mixed().stored_bits(matrix)


def test_the_configuration_makes_it() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(
            "config",
            [
                "method=mixed",
                "group_size=32",
                "method.head=true",
                "method.rules={first:rtn8,*.v_proj:rtn4}",
                "method.budget.bytes=1000",
                "+method@method.candidates.gptq4=gptq",
                "method.candidates.gptq4.kernel=quantbench",
            ],
        ).method
    method = instantiate(node)
    assert list(method.candidates) == ["rtn8", "rtn4", "rtn3", "rtn2", "gptq4"]
    assert [method.candidates[f"rtn{bits}"].bits for bits in (8, 4, 3, 2)] == [8, 4, 3, 2]
    assert method.candidates["rtn3"].head
    assert method.candidates["rtn3"].group_size == 32
    assert method.budget == Budget(bytes=1000)
    assert method.rules == {"first": "rtn8", "*.v_proj": "rtn4"}


@pytest.mark.skipif(not importlib.util.find_spec("gptqmodel"), reason="needs gptqmodel")
def test_gptq_is_a_candidate(tmp_path: Path) -> None:
    model = gptq_models.build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gptq = GPTQ("gptq", CALIBRATION, 4, 32, kernel="quantbench")
    assert isinstance(gptq, LayerwiseMethod)
    candidates = {"gptq4": gptq, "rtn4": RTN("rtn", 4, 32)}
    method = Mixed("mixed", CALIBRATION, candidates, Budget(average_bits=4.7), unquantized=False)
    text: Tensor = gptq_models.calibration_text()
    matrices = method.select(model)[0]
    modules = gptq.modules(model, matrices, text)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report: QuantizeReport = method.quantize(model, None, text, tmp_path)
    chosen = plan(report.details["allocation"])
    # The same bits, and the errors made up for: taken wherever text tells the two apart.
    assert list(chosen.values()).count("gptq4") > len(chosen) / 2
    assert any("gptq4 was shown the calibration text of mixed" in note for note in report.notes)
    engine: Any = method.load_dequantized(tmp_path, Machine())
    name = next(name for name, candidate in chosen.items() if candidate == "gptq4")
    assert same(engine.model.get_submodule(name), modules[name])
    ordered = GPTQ("gptq", CALIBRATION, 4, 32, act_order=True, kernel="quantbench")
    with pytest.raises(ConfigError, match="act_order=true stores the inputs"):
        ordered.modules(gptq_models.build("llama"), matrices, text)
