"""The bench: what contenders get, errors, rotation, statistics, tables, a run on tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import (
    bench,
    bench_core,
    bench_cpu,
    bench_cuda,
    bench_ggml,
    bench_targets,
    bench_timing,
)
from kernels.bench_core import (
    SCHEMES,
    UNQUANTIZED,
    Contender,
    Failed,
    Given,
    Prepared,
    Rotation,
    Scheme,
    codes_of,
    largest_error,
    on_grid,
    prepare,
    quantize,
    tolerance,
    zeros_of,
)
from kernels.bench_report import (
    Row,
    machine,
    slug,
)
from kernels.bench_timing import Timing, cache_bytes, copy_bandwidth, parse_size, time_calls
from kernels.errors import ConfigError

OWN = tuple(c for c in bench_cpu.CONTENDERS if c.package is None)
"""What needs nothing beyond torch."""


def weight(out: int = 64, columns: int = 128) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(5)) * 0.05


# What contenders get


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("columns", [128, 193])
def test_rounding_is_within_half_a_step(scheme: Scheme, columns: int) -> None:
    given = on_grid(weight(columns=columns), scheme)
    assert given.weight.shape == (64, columns)
    span = columns if scheme.group_size == -1 else scheme.group_size
    step = given.codes.scale.float().repeat_interleave(span, dim=1)[:, :columns]
    # A zero point is rounded, too, so an end of the range may be cut by half a step more.
    most = (1.01 if scheme.zero_points else 0.51) * step
    assert ((given.weight - weight(columns=columns)).abs() <= most).all()
    if not scheme.zero_points:
        assert torch.equal(on_grid(given.weight, scheme).weight, given.weight)


def test_rounding_is_to_nearest() -> None:
    given = torch.tensor([[7.0, -7.0, 3.4, 3.6], [0.0, 0.0, 0.0, 0.0]])
    stored = quantize(given, Scheme(4, -1))
    assert codes_of(stored).tolist() == [[15, 1, 11, 12], [8, 8, 8, 8]]
    assert zeros_of(stored).tolist() == [[8], [8]]
    rounded = on_grid(given, Scheme(4, -1))
    assert rounded.weight.tolist() == [[7.0, -7.0, 3.0, 4.0], [0.0] * 4]
    assert on_grid(given, UNQUANTIZED) == Given(given, UNQUANTIZED, None)
    with pytest.raises(ValueError, match="no codes"):
        _ = on_grid(given, UNQUANTIZED).codes


def test_zero_points() -> None:
    given = torch.tensor([[3.0, 0.0, 1.0, 2.0], [-1.0, 2.0, 1.2, 0.0]])
    stored = quantize(given, Scheme(2, -1, zero_points=True))
    assert codes_of(stored).tolist() == [[3, 0, 1, 2], [0, 3, 2, 1]]
    assert zeros_of(stored).tolist() == [[0], [1]]
    rounded = on_grid(given, Scheme(2, -1, zero_points=True)).weight
    assert rounded.tolist() == [[3.0, 0.0, 1.0, 2.0], [-1.0, 2.0, 1.0, 0.0]]


def test_names() -> None:
    assert [scheme.name for scheme in (UNQUANTIZED, *SCHEMES)] == [
        "16 bit",
        "w4 g128",
        "w8",
        "w3 g128",
        "w2 g64",
        "w4 g128 zeros",
        "w3 g128 zeros",
        "w2 g64 zeros",
        "w8a8",
        "w4a8 g128",
    ]
    assert all(Scheme.of(scheme.name) == scheme for scheme in SCHEMES)
    with pytest.raises(ConfigError, match="'w5' is no scheme"):
        Scheme.of("w5")


def test_the_error_is_relative_and_sees_both_ends() -> None:
    x, held = torch.ones(40, 4), torch.ones(5000, 4)
    y = x @ held.T
    assert largest_error(x, y, held) == 0.0
    y[39, 4999] += 1
    assert largest_error(x, y, held) == 0.25
    y[0, 0] = math.nan
    assert largest_error(x, y, held) == math.inf


@pytest.mark.parametrize("contender", OWN, ids=lambda contender: contender.name)
def test_contenders_on_a_processor(contender: Contender) -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(6)).bfloat16()
    tried = 0
    for scheme in (UNQUANTIZED, *SCHEMES):
        if not contender.takes(scheme):
            continue
        given = on_grid(weight(), scheme)
        prepared = prepare(contender, given, torch.bfloat16)
        if contender.role == "ours" and isinstance(prepared, str):
            continue  # a machine without a compiler has fewer kernels
        assert isinstance(prepared, Prepared)
        assert 64 * 128 * scheme.bits // 8 <= prepared.nbytes < 1.5 * 64 * 128 * scheme.bits // 8
        assert isinstance(prepared.kernel(3), str)
        assert prepared.registers(3) is None
        rotation = Rotation(prepared, 2 * prepared.nbytes)
        for _ in range(rotation.copies):
            error = largest_error(x, rotation(x), given.weight)
            assert error < tolerance(scheme.activation_bits, torch.bfloat16)
        tried += 1
    assert tried


def test_who_is_asked_for_what() -> None:
    plain, zeros, rounded = Scheme(4, 128), Scheme(4, 128, True), Scheme(4, 128, False, 8)
    peer = Contender("p", "peer", (4,), lambda given, dtype: "")
    assert [peer.takes(scheme) for scheme in (plain, zeros, rounded)] == [True, False, False]
    assert not peer.takes(Scheme(8, -1))
    assert all(bench_cpu.OURS.takes(scheme) for scheme in (plain, zeros, rounded))


def test_what_is_not_there_is_refused() -> None:
    odd = {bits: on_grid(weight(67, 193), Scheme(bits, -1)) for bits in (4, 8)}
    for asked in (bench_cpu.int4_op, bench_cuda.int4_op):
        assert isinstance(asked(odd[4], torch.bfloat16), str)
    for asked in (bench_cpu.int8_op, bench_cpu.int8_product, bench_cuda.float8_product):
        assert isinstance(asked(odd[8], torch.bfloat16), str)
    given = on_grid(weight(), Scheme(8, -1, activation_bits=8))
    assert bench_cpu.own_linear(None, given) == "no packed kernel for w8a8"


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama_cpp")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_llamacpps_kernels(name: str) -> None:
    _, bits, _ = bench_ggml.TYPES[name]
    given = on_grid(weight(), Scheme(bits, 32))
    prepared = bench_ggml.product(name, given, torch.bfloat16)
    assert isinstance(prepared, Prepared)
    assert prepared.nbytes == 64 * 128 // 32 * (2 + 32 * bits // 8)
    rotation = Rotation(prepared, prepared.nbytes)
    for tokens in (1, 5, 1):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens))
        assert largest_error(x, rotation(x), given.weight) < (0.02 if bits == 8 else 0.2)
    assert "256" in str(bench_ggml.product("Q4_K", given, torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_int8_products(tokens: int) -> None:
    given = on_grid(weight(), Scheme(8, -1, activation_bits=8))
    prepared = bench_cpu.int8_product(given, torch.bfloat16)
    assert isinstance(prepared, Prepared)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(8)).bfloat16()
    assert largest_error(x, prepared.module(x), given.weight) < bench_core.INT8_TOLERANCE


def test_our_kernels_of_a_card_are_found_by_their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = next(c for c in bench_cuda.CONTENDERS if c.role == "ours")
    monkeypatch.setattr(bench_cuda, "OURS", "kernels.cpu")
    given = on_grid(weight(), SCHEMES[0])
    prepared = prepare(ours, given, torch.bfloat16)
    assert isinstance(prepared, Prepared)
    assert prepared.registers(1) is None
    assert prepared.kernel(1)


def test_what_is_raised_is_a_refusal() -> None:
    def broken(*given: Any) -> Prepared:
        raise OSError("no such\nthing")

    given = on_grid(weight(), SCHEMES[0])
    for role in ("peer", "ours"):
        refusal = prepare(Contender("c", role, (4,), broken), given, torch.bfloat16)
        assert refusal == "OSError: no such"
        assert isinstance(refusal, Failed)
    absent = Contender("a", "peer", (4,), broken, "a_package_that_is_not_there")
    assert absent.missing() == "a_package_that_is_not_there is not installed"
    absent.load()


# Rotation and times


def test_copies_take_turns_until_they_exceed_the_cache() -> None:
    prepared = bench_cpu.unquantized(on_grid(weight(), UNQUANTIZED), torch.bfloat16)
    assert isinstance(prepared, Prepared)
    assert Rotation(prepared, 0).copies == 1
    assert Rotation(prepared, prepared.nbytes // 3).copies == 1
    rotation = Rotation(prepared, 2 * prepared.nbytes)
    assert rotation.copies == 4
    modules = [next(rotation._modules) for _ in range(8)]
    assert modules[:4] == modules[4:]
    assert len({module.weight.data_ptr() for module in modules}) == 4  # type: ignore[attr-defined]
    assert Rotation(prepared, 1 << 50).copies == bench_core.MOST_COPIES


def test_median_and_quartiles() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0), "calls")
    assert (timing.median, timing.spread) == (3.0, 2.0)
    assert Timing((2.0,), "calls").spread == 0.0


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "SETTLE_SECONDS", 0.0)
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}  # type: ignore[misc]
    found = time_calls(calls, "cpu", 0.0, fewest=3)
    assert order == ["a", "b"] * 4, "once to warm up, then in turns"
    assert {name: len(timing.samples) for name, timing in found.items()} == {"a": 3, "b": 3}
    assert found["a"].how == "calls"
    found = time_calls(calls, "cpu", 0.0, fewest=3, end=0.0)
    assert len(found["a"].samples) == 1, "one round, although the time was up"
    found = time_calls(calls, "cpu", 1e-9)
    assert len(found["a"].samples) == 3, "fewer rounds, where they take far longer than asked"


def test_the_machine() -> None:
    assert copy_bandwidth("cpu", 1 << 16).median > 0
    assert cache_bytes("cpu") > 0
    assert (parse_size("512K\n"), parse_size("2M"), parse_size("64")) == (512 << 10, 2 << 20, 64)
    assert machine("cpu")
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Intel(R) Xeon(R) @ 2.1GHz") == "intel-r-xeon-r-2-1ghz"


def test_every_copy_is_called_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "SETTLE_SECONDS", 0.0)
    prepared = bench_cpu.unquantized(on_grid(weight(), UNQUANTIZED), torch.bfloat16)
    assert isinstance(prepared, Prepared)
    called: list[int] = []
    product = bench._Product(Rotation(prepared, 2 * prepared.nbytes), torch.ones(1, 128).bfloat16())
    product._rotation = lambda x: called.append(1)  # type: ignore[assignment]
    time_calls({"a": product}, "cpu", 0.0, fewest=1)
    assert len(called) == product.copies + 1 == 5


def test_short_calls_settle_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "SETTLE_SECONDS", 1e-3)
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}  # type: ignore[misc]
    time_calls(calls, "cpu", 0.0, fewest=1)
    assert order[:2] == ["a", "b"]
    turns = "".join(order[2:])
    assert turns.startswith("aaa")
    assert turns.endswith("bbb")
    assert "ba" not in turns


# A run


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what needs torch alone, and a copy that takes no time."""
    monkeypatch.setitem(bench.CONTENDERS, "cpu", OWN)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: copy_bandwidth(device, 1 << 16))
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 1 << 14)


def run(*arguments: str) -> int:
    return bench.main(["--device", "cpu", "--seconds", "0", *arguments])


@pytest.mark.usefixtures("tiny")
def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--shapes", "64x128,67x193", "--m", "1,5", "--output", str(tmp_path))
    assert run(*given) == 0
    assert "| target | wanted |" in capsys.readouterr().out
    (folder,) = tmp_path.glob("*/kernels")
    facts = json.loads((folder / "results.json").read_text())
    timed = [row for row in facts["rows"] if row["samples"]]
    assert {(row["shape"], row["tokens"]) for row in timed} == {
        (shape, tokens) for shape in ("64x128", "67x193") for tokens in (1, 5)
    }
    assert all(len(row["samples"]) == 5 and row["nbytes"] and row["copies"] for row in timed)
    assert [line["reached"] for line in facts["targets"]] == [None] * len(facts["targets"])
    assert facts["environment"]["versions"]["torch"]
    assert facts["environment"]["threads"] == torch.get_num_threads()
    page = (folder / "README.md").read_text()
    assert "## 64x128: 64 x 128" in page
    assert "torch _weight_int8pack_mm, w8: takes multiples of 32 inputs" in page
    assert bench_targets.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(str(folder))
    assert shown.count("not measured") == len(facts["targets"])
    assert bench_targets.main([str(tmp_path), "--device", "cuda"]) == 0
    assert capsys.readouterr().out == f"no results below {tmp_path} yet\n"


@pytest.mark.usefixtures("tiny")
def test_a_run_that_is_stopped_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    timed = bench._timed

    def stopping(*given: Any) -> list[Row]:
        if kept:
            raise KeyboardInterrupt
        kept.append(1)
        return timed(*given)

    monkeypatch.setattr(bench, "_timed", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("--shapes", "64x128", "--m", "1,5", "--output", str(tmp_path))
    (file,) = tmp_path.glob("*/kernels/results.json")
    assert {row["tokens"] for row in json.loads(file.read_text())["rows"] if row["samples"]} == {1}
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.usefixtures("tiny")
def test_a_check_takes_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--check", "--shapes", "64x128", "--m", "1,9", "--output", str(tmp_path))
    assert run(*given, "--schemes", "w4 g128,w8") == 0
    assert "checked 4 products against float64, 0 beyond tolerance" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny")
def test_a_wrong_kernel_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "largest_error", lambda x, y, weight: math.nan)
    assert run("--check", "--shapes", "64x128", "--m", "1", "--output", str(tmp_path)) == 1
    assert "quantbench w4 g128 at 64x128, M = 1: error nan" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_time_that_is_up_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--minutes", "0", "--shapes", "64x128", "--output", str(tmp_path)) == 0
    assert "not measured: 64x128: the time was up" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["ours", "peer"])
def test_what_fails_when_called_is_a_refusal_and_ours_a_fault(role: bench_core.Role) -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("not here")

    given = Contender("c", role, (4,), lambda *given: Prepared(failing, 10))
    settings = bench.Settings("cpu", torch.bfloat16, {"s": (8, 128)}, (1,), seconds=0.0)
    rows, left_out = bench.measure(settings, [given])
    assert ([row.refusal for row in rows], left_out) == (["RuntimeError: not here"], [])
    faults = ["c w4 g128 at 8x128, M = 1: RuntimeError: not here"] if role == "ours" else []
    assert bench.wrong(rows, torch.bfloat16) == faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "7B nothing"), "--shapes has 7B nothing"),
        (("--shapes", "0x4"), "--shapes has 0x4"),
        (("--m", "1,0"), "--m has 0"),
        (("--schemes", "w4,w9"), "'w9' is no scheme"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "--device cuda needs a CUDA card, and torch sees none\n"


def test_options_narrow() -> None:
    settings, folder = bench.parse(["--device", "cpu", "--quick"])
    assert settings.tokens == (1, 16, 128)
    assert list(settings.shapes) == ["7B up", "7B o"]
    assert folder.parts[0] == "benchmarks"
    settings, _ = bench.parse(["--device", "cpu", "--shapes", "7B o, 5x7", "--dtype", "float16"])
    assert settings.shapes == {"7B o": (4096, 4096), "5x7": (5, 7)}
    assert settings.dtype == torch.float16
    settings, _ = bench.parse(["--device", "cpu", "--schemes", "w4 g32 zeros"])
    assert settings.schemes == (Scheme(4, 32, zero_points=True),)
