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

from kernels import bench, bench_core, bench_cpu, bench_cuda, bench_report
from kernels.bench_core import (
    SCHEMES,
    TOLERANCE,
    UNQUANTIZED,
    Contender,
    Prepared,
    Rotation,
    Scheme,
    codes_of,
    largest_error,
    on_grid,
    prepare,
    quantize,
)
from kernels.bench_report import (
    Row,
    Target,
    derive,
    machine,
    refusals,
    result_tables,
    slug,
    target_table,
)
from kernels.bench_timing import Timing, cache_bytes, copy_bandwidth, parse_size, time_calls

OWN = tuple(c for c in bench_cpu.CONTENDERS if c.package is None)
"""What needs nothing beyond torch."""


def weight(out: int = 64, columns: int = 128) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(5)) * 0.05


# What contenders get


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("columns", [128, 193])
def test_rounding_twice_changes_nothing(scheme: Scheme, columns: int) -> None:
    once = on_grid(weight(columns=columns), scheme)
    assert once.shape == (64, columns)
    assert torch.equal(on_grid(once, scheme), once)


def test_rounding_is_to_nearest() -> None:
    given = torch.tensor([[7.0, -7.0, 3.4, 3.6], [0.0, 0.0, 0.0, 0.0]])
    stored = quantize(given, 4, -1)
    assert codes_of(stored).tolist() == [[15, 1, 11, 12], [8, 8, 8, 8]]
    assert on_grid(given, Scheme(4, -1)).tolist() == [[7.0, -7.0, 3.0, 4.0], [0.0] * 4]
    assert on_grid(given, UNQUANTIZED) is given


def test_names() -> None:
    assert [scheme.name for scheme in (UNQUANTIZED, *SCHEMES)] == [
        "16 bit",
        "w4 g128",
        "w8",
        "w3 g128",
        "w2 g64",
    ]


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
    for scheme in (UNQUANTIZED, *SCHEMES):
        if scheme.bits not in contender.bits or (contender.role == "ours" and scheme.bits < 4):
            continue
        given = on_grid(weight(), scheme)
        prepared = prepare(contender, given, scheme, torch.bfloat16)
        assert isinstance(prepared, Prepared)
        assert 64 * 128 * scheme.bits // 8 <= prepared.nbytes < 1.2 * 64 * 128 * scheme.bits // 8
        rotation = Rotation(prepared, 2 * prepared.nbytes)
        for _ in range(rotation.copies):
            assert largest_error(x, rotation(x), given) < TOLERANCE[torch.bfloat16]


def test_what_pytorchs_ops_do_not_take_is_refused() -> None:
    odd = weight(67, 193)
    assert isinstance(bench_cpu.int4_op(odd, 4, 128, torch.bfloat16), str)
    assert isinstance(bench_cpu.int8_op(odd, 8, -1, torch.bfloat16), str)
    assert "3 bits" in str(bench_cpu.packed(odd, 3, 128, torch.bfloat16))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama_cpp")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_llamacpps_kernels(name: str) -> None:
    _, bits, _ = bench_cpu.GGML_TYPES[name]
    given = on_grid(weight(), Scheme(bits, 32))
    prepared = bench_cpu.ggml(name, given, bits, 32, torch.bfloat16)
    assert isinstance(prepared, Prepared)
    assert prepared.nbytes == 64 * 128 // 32 * (2 + 32 * bits // 8)
    rotation = Rotation(prepared, prepared.nbytes)
    for tokens in (1, 5, 1):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens))
        assert largest_error(x, rotation(x), given) < (0.02 if bits == 8 else 0.2)
    assert "256" in str(bench_cpu.ggml("Q4_K", given, 4, 128, torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_int8_products_of_a_card(tokens: int) -> None:
    scheme = Scheme(8, -1)
    given = on_grid(weight(), scheme)
    prepared = bench_cuda.int8_product(given, 8, -1, torch.bfloat16)
    assert isinstance(prepared, Prepared)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(8)).bfloat16()
    assert largest_error(x, prepared.module(x), given) < 2e-2
    assert isinstance(bench_cuda.int8_product(weight(67, 193), 8, -1, torch.bfloat16), str)


def test_our_kernels_of_a_card_are_found_by_their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = next(c for c in bench_cuda.CONTENDERS if c.role == "ours")
    monkeypatch.setattr(bench_cuda, "OURS", "kernels.cpu")
    given = on_grid(weight(), SCHEMES[0])
    prepared = prepare(ours, given, SCHEMES[0], torch.bfloat16)
    assert isinstance(prepared, Prepared)
    assert prepared.registers is None
    assert "no packed kernel for 3 bits" in str(ours.prepare(given, 3, 128, torch.bfloat16))


def test_a_library_that_fails_is_a_refusal_and_ours_is_an_error() -> None:
    def broken(*given: Any) -> Prepared:
        raise OSError("no such\nthing")

    peer = Contender("peer", "peer", (4,), broken)
    assert prepare(peer, weight(), SCHEMES[0], torch.bfloat16) == "OSError: no such"
    with pytest.raises(OSError, match="no such"):
        prepare(Contender("ours", "ours", (4,), broken), weight(), SCHEMES[0], torch.bfloat16)
    absent = Contender("a", "peer", (4,), broken, "a_package_that_is_not_there")
    assert absent.missing() == "a_package_that_is_not_there is not installed"
    absent.load()


# Rotation and times


def test_copies_take_turns_until_they_exceed_the_cache() -> None:
    prepared = bench_cpu.unquantized(weight(), 16, -1, torch.bfloat16)
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


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}  # type: ignore[misc]
    found = time_calls(calls, "cpu", 0.0, fewest=3)
    assert order == ["a", "b"] * 4, "once to warm up, then in turns"
    assert {name: len(timing.samples) for name, timing in found.items()} == {"a": 3, "b": 3}
    assert found["a"].how == "calls"


def test_the_machine() -> None:
    assert copy_bandwidth("cpu", 1 << 16).median > 0
    assert cache_bytes("cpu") > 0
    assert (parse_size("512K\n"), parse_size("2M"), parse_size("64")) == (512 << 10, 2 << 20, 64)
    assert machine("cpu")
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Intel(R) Xeon(R) @ 2.1GHz") == "intel-r-xeon-r-2-1ghz"


# Tables


def row(contender: str, role: bench_core.Role, bits: int, seconds: float, **more: Any) -> Row:
    facts = {"shape": "s", "out_features": 8, "in_features": 16, "tokens": 1, **more}
    nbytes = more.pop("nbytes", 100)
    facts.pop("nbytes", None)
    return Row(
        bits=bits,
        group_size=-1,
        contender=contender,
        role=role,
        nbytes=nbytes,
        median=seconds,
        samples=(seconds,),
        how="calls",
        **facts,
    )


ROWS = [
    row("linear", "baseline", 16, 8.0),
    row("mine", "ours", 4, 2.0),
    row("slow", "peer", 4, 5.0),
    row("fast", "peer", 4, 1.0),
    row("other bits", "peer", 8, 0.5),
    row("mine", "ours", 4, 4.0, tokens=16),
    Row("s", 8, 16, 0, 3, -1, "mine", "ours", refusal="no packed kernel"),
]


def test_what_follows_from_the_rows() -> None:
    found = {(d.row.contender, d.row.tokens): d for d in derive(ROWS, 200.0)}
    mine = found["mine", 1]
    assert (mine.share, mine.faster, mine.ahead) == (0.25, 4.0, 0.5)
    assert (mine.row.bandwidth, mine.row.operations) == (50.0, 128.0)
    assert found["linear", 1].ahead is None
    alone = found["mine", 16]
    assert (alone.faster, alone.ahead) == (None, None)
    assert len(found) == 6


def test_targets_show_the_worst() -> None:
    derived = derive([*ROWS, row("mine", "ours", 4, 4.0, shape="t", nbytes=40_000_000)], 200.0)
    bandwidth = Target("of the copy", 0.2, "share", 4, (1, 128))
    assert bandwidth.values(derived) == [0.25, 0.125, 50_000.0]
    large = Target("large", 0.2, "share", 4, megabytes=(40, 50))
    behind = Target("of slow", 1.0, "ahead", 4, peer="slow")
    none = Target("none", 1.0, "faster", 2)
    text = target_table([bandwidth, large, behind, none], derived)
    assert "| of the copy | 0.20 | 0.12 | 3 | no |" in text
    assert "| large | 0.20 | 50000.00 | 1 | yes |" in text
    assert "| of slow | 1.00 | 2.50 | 1 | yes |" in text
    assert "| none | 1.00 | not measured | 0 |  |" in text


def test_the_tables_have_every_row() -> None:
    text = result_tables(derive(ROWS, 200.0))
    assert text.startswith("## s: 8 x 16\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6
    assert {line.count("|") for line in lines} == {len(bench_report.COLUMNS) + 1}
    assert refusals(ROWS) == "- mine, w3: no packed kernel (s)\n"


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
    assert facts["environment"]["versions"]["torch"]
    assert facts["environment"]["threads"] == torch.get_num_threads()
    page = (folder / "README.md").read_text()
    assert "## 64x128: 64 x 128" in page
    assert "quantbench, w3 g128: no packed kernel for 3 bits (64x128, 67x193)" in page


@pytest.mark.usefixtures("tiny")
def test_a_check_takes_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--check", "--shapes", "64x128", "--m", "1,9", "--output", str(tmp_path))
    assert run(*given) == 0
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


def test_a_peer_that_fails_when_called_is_a_refusal() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("not here")

    given = Contender("peer", "peer", (4,), lambda *given: Prepared(failing, 10))
    settings = bench.Settings("cpu", torch.bfloat16, {"s": (8, 128)}, (1,), seconds=0.0)
    rows, left_out = bench.measure(settings, [given], [Scheme(4, 128)])
    assert ([row.refusal for row in rows], left_out) == (["RuntimeError: not here"], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "7B nothing"), "--shapes has 7B nothing"),
        (("--shapes", "0x4"), "--shapes has 0x4"),
        (("--m", "1,0"), "--m has 0"),
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
