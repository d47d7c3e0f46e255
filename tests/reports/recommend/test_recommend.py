from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.record import Record, Value
from reports.gather import make_groups, make_rows
from reports.recommend.command import main, recommend
from reports.recommend.conditions import FIGURES, ConditionError, read_conditions
from reports.recommend.counsel import case_of
from reports.recommend.text import Answer, answer_json, answer_text
from tests.reports.synthetic import (
    PERPLEXITY,
    SPEED,
    Synthetic,
    changed,
    failed,
    score_of,
    simulated,
    with_random_weights,
)

WINDOWS = 64
TASK = "hellaswag_0shot_limit200"
MEMORY = "process_peak_depth128"


def made(
    method: str,
    bits: float,
    increase: float,
    *,
    memory: float,
    speed: float,
    wobble: float = 0.0,
    **config: Any,
) -> Record:
    """A record of known figures: perplexity `increase` over 10 (a share), bytes, tokens/s.

    `wobble` is how far the loss of a window goes either way, so that it cannot be told apart.
    """
    record = Synthetic().cell(method, bits, None if bits > 8 else 128, "packed", "a kernel")
    text = random.Random("text")
    losses = []
    for index in range(WINDOWS):
        own = wobble if index % 2 else -wobble
        losses.append(math.log(10) + text.gauss(0, 0.3) + math.log1p(increase) + own)
    mean = sum(losses) / WINDOWS
    level = [loss - mean + math.log(10) + math.log1p(increase) for loss in losses]
    values = (
        Value(
            "perplexity",
            "perplexity",
            PERPLEXITY,
            10 * (1 + increase),
            "perplexity",
            False,
            samples=tuple(level),
        ),
        Value("memory", "peak_memory_bytes", MEMORY, memory, "B", False),
        Value("size", "artefact_bytes", "stored", memory / 2, "B", False),
        Value("size", "bits_per_weight", "stored", bits + 0.25, "bits", False),
        Value("divergence", "kl_mean", PERPLEXITY, increase / 3, "nats", False),
        Value("speed", "decode_tokens_per_second", SPEED, speed, "tokens/s", True),
        Value("speed", "prefill_tokens_per_second", SPEED, 10 * speed, "tokens/s", True),
        Value("speed", "ttft_seconds", SPEED, 1 / speed, "s", False),
        Value("speed", "timing_spread", SPEED, 0.03, "ratio", None),
        Value("quantize", "quantize_seconds", "quantize", 60.0 / bits, "s", False),
    )
    return replace(record, values=values, config={**record.config, **config})


def rows() -> list[Record]:
    """A baseline; two 8-bit rows that nothing tells apart; 4, 3 and 2 bits, each worse."""
    return [
        made("fp32", 32, 0.0, memory=28e9, speed=10),
        made("rtn", 8, 0.001, memory=8e9, speed=25, wobble=0.02),
        made("gptq", 8, 0.0005, memory=9e9, speed=24, wobble=-0.02),
        made("awq", 4, 0.02, memory=5e9, speed=40),
        made("gptq", 3, 0.08, memory=4e9, speed=45),
        made("rtn", 2, 0.5, memory=6e9, speed=20),
    ]


def one(records: list[Record], *conditions: str) -> Answer:
    (answer,) = recommend(records, conditions)
    return answer


def names(answer: Answer, part: str) -> list[str]:
    return [found.row.label for found in getattr(answer.selection, part)]


def chosen(answer: Answer) -> str:
    assert answer.selection.choice is not None
    return answer.selection.choice.row.label


GPTQ8, RTN8, AWQ4 = "gptq 8 bits g128", "rtn 8 bits g128", "awq 4 bits g128"
GPTQ3, RTN2 = "gptq 3 bits g128", "rtn 2 bits g128"


@pytest.mark.parametrize(
    ("condition", "qualifying"),
    [
        ("max_perplexity_increase=3%", {"fp32", GPTQ8, RTN8, AWQ4}),
        ("max_perplexity_increase=0.0008", {"fp32", GPTQ8}),
        ("max_kl=0.01", {"fp32", GPTQ8, RTN8, AWQ4}),
        ("max_size=4GB", {RTN8, AWQ4, GPTQ3, RTN2}),
        ("max_size=2500MB", {AWQ4, GPTQ3}),
        ("max_memory=8GB", {RTN8, AWQ4, GPTQ3, RTN2}),
        ("max_memory=8GiB", {RTN8, AWQ4, GPTQ3, RTN2}),
        ("max_memory=9000000000", {RTN8, GPTQ8, AWQ4, GPTQ3, RTN2}),
        ("max_bits_per_weight=4.5", {AWQ4, GPTQ3, RTN2}),
        ("min_decode_tokens_per_second=25", {RTN8, AWQ4, GPTQ3}),
        ("min_prefill_tokens_per_second=401", {GPTQ3}),
        ("max_ttft=25ms", {AWQ4, GPTQ3}),
        ("max_ttft=0.04s", {RTN8, AWQ4, GPTQ3}),
        ("max_quantize_seconds=10", {"fp32", GPTQ8, RTN8}),
        ("max_quantize_seconds=10s", {"fp32", GPTQ8, RTN8}),
        ("method=gptq", {GPTQ8, GPTQ3}),
        ("method=awq,fp32", {"fp32", AWQ4}),
        ("execution=packed", {"fp32", GPTQ8, RTN8, AWQ4, GPTQ3, RTN2}),
        ("hardware=cpu", {"fp32", GPTQ8, RTN8, AWQ4, GPTQ3, RTN2}),
        ("model=embedded", {"fp32", GPTQ8, RTN8, AWQ4, GPTQ3, RTN2}),
    ],
)
def test_every_condition_keeps_what_it_should(condition: str, qualifying: set[str]) -> None:
    assert set(names(one(rows(), condition), "qualifying")) == qualifying


def test_every_known_figure_was_tried() -> None:
    (mark,) = test_every_condition_keeps_what_it_should.pytestmark  # type: ignore[attr-defined]
    tried = {condition.partition("=")[0].partition("_")[2] for condition, _ in mark.args[1]}
    assert set(FIGURES) <= tried


def test_the_front_is_what_no_other_row_beats() -> None:
    answer = one(rows())
    front = {
        found.row.label
        for found in answer.selection.qualifying
        if found.row.record.cell in answer.selection.front
    }
    # 2 bits are worse, larger and slower than 4; what is best in one thing is on it.
    assert front == {"fp32", GPTQ8, RTN8, AWQ4, GPTQ3}


def test_rows_that_nothing_tells_apart_are_chosen_by_memory() -> None:
    answer = one(rows(), "max_perplexity_increase=3%")
    assert chosen(answer) == RTN8
    assert answer.selection.choice is not None
    said = " ".join(answer.selection.choice.why)
    assert "Holm" in said
    assert f"{GPTQ8} has the lowest perplexity, 10.0" in said
    assert f"; {RTN8} cannot be told from it." in said
    assert "least peak memory: 8.00 GB" in said
    assert "The unquantized fp32 qualifies too." in said


def test_equal_memory_is_decided_by_speed() -> None:
    records = rows()
    records[1] = made("rtn", 8, 0.001, memory=8.95e9, speed=30, wobble=0.02)
    answer = one(records, "max_perplexity_increase=3%")
    assert chosen(answer) == RTN8
    assert answer.selection.choice is not None
    assert "decodes fastest: 30.0 tokens/s" in " ".join(answer.selection.choice.why)


def test_a_difference_that_shows_is_no_tie() -> None:
    records = rows()
    records[1] = made("rtn", 8, 0.01, memory=8e9, speed=25)
    assert chosen(one(records, "max_perplexity_increase=3%")) == GPTQ8


def test_too_few_samples_make_no_tie() -> None:
    records = [
        replace(r, values=tuple(replace(v, samples=v.samples[:4]) for v in r.values))
        for r in rows()
    ]
    records = [
        changed(r, "perplexity", value=math.exp(sum(_losses(r)) / len(_losses(r)))) for r in records
    ]
    answer = one(records, "method=gptq,awq")
    assert answer.selection.choice is not None
    assert "4 samples" in " ".join(answer.selection.choice.why)


def _losses(record: Record) -> tuple[float, ...]:
    return next(value.samples for value in record.values if value.metric == "perplexity")


def test_a_priority_chooses_another_end_of_the_front() -> None:
    within = "max_perplexity_increase=10%"
    assert chosen(one(rows(), within, "priority=size")) == GPTQ3
    assert chosen(one(rows(), within, "priority=speed")) == GPTQ3
    answer = one(rows(), within)
    assert answer.selection.choice is not None
    assert [(what, row.label) for what, row in answer.selection.choice.others] == [
        ("least loss", GPTQ8),
        ("least memory, fastest", GPTQ3),
    ]


def test_a_priority_that_nothing_measures_asks_the_documents_alone() -> None:
    answer = one(rows(), "priority=ease", "max_perplexity_increase=3%")
    assert chosen(answer) == RTN8
    assert answer.selection.choice is not None
    assert "ranks rows by ease: it asks the documents alone" in " ".join(
        answer.selection.choice.why
    )
    assert "nf4 or bnb_int8" in {piece.text for piece in answer.pieces}


def test_the_baseline_is_chosen_only_where_it_is_alone() -> None:
    answer = one(rows(), "min_bits_per_weight=20")
    assert chosen(answer) == "fp32"
    assert answer.selection.choice is not None
    assert "alone on the front" in answer.selection.choice.why[0]


def test_nothing_qualifies_and_the_nearest_is_named() -> None:
    answer = one(rows(), "max_memory=4.5GB", "max_perplexity_increase=3%")
    assert answer.selection.choice is None
    assert names(answer, "misses")[0] == GPTQ3
    text = answer_text(answer, 140, colour=False)
    assert "Nothing qualifies." in text
    assert f"Nearest: {GPTQ3}: max_perplexity_increase: +8.0 %, 5 points above 3%" in text
    assert "max_memory: 5.00 GB, 500 MB above 4.5GB" in text
    # 4 bits break one limit by a ninth, 3 bits theirs by less; 32 bits by far more.
    assert names(answer, "misses")[:2] == [GPTQ3, AWQ4]


def test_what_was_not_measured_does_not_qualify() -> None:
    records = rows()
    without = tuple(v for v in records[3].values if v.measure != "speed")
    records[3] = replace(records[3], values=without)
    answer = one(records, "min_decode_tokens_per_second=20", "max_memory=9GB")
    assert names(answer, "unmeasured") == [AWQ4]
    assert AWQ4 not in names(answer, "qualifying")
    text = answer_text(answer, 140, colour=False)
    assert "min_decode_tokens_per_second: not measured" in text


def test_a_row_measured_in_part_is_the_worst_where_it_was_not() -> None:
    records = rows()
    without = tuple(v for v in records[5].values if v.metric == "peak_memory_bytes")
    records[5] = replace(records[5], values=without)
    answer = one(records)
    assert records[5].cell not in answer.selection.front


def test_simulated_rows_and_random_weights_have_no_such_figure() -> None:
    records = rows()
    records[3] = simulated(records[3])
    answer = one(records, "max_memory=9GB")
    (found,) = answer.selection.unmeasured
    assert found.unmeasured[0].text == "simulated"
    drawn = one([with_random_weights(record) for record in rows()], "max_perplexity_increase=3%")
    assert {c.unmeasured[0].text for c in drawn.selection.unmeasured} == {"random weights"}


def test_without_quality_only_a_stated_priority_chooses() -> None:
    drawn = [with_random_weights(record) for record in rows()]
    answer = one(drawn, "max_memory=9GB")
    assert answer.selection.qualifying
    assert answer.selection.choice is None
    text = answer_text(answer, 140, colour=False)
    assert "No choice." in text
    assert "Of these rows no quality was measured" in text
    assert chosen(one(drawn, "max_memory=9GB", "priority=size")) == GPTQ3
    assert chosen(one(drawn, "max_memory=9GB", "priority=speed")) == GPTQ3


def test_without_a_baseline_no_increase_is_known() -> None:
    answer = one(rows()[1:], "max_perplexity_increase=3%")
    assert answer.selection.choice is None
    assert "its baseline was not measured" in answer_text(answer, 140, colour=False)


def test_failed_cells_are_listed_with_their_reason() -> None:
    records = rows()
    records[3] = failed(records[3])
    text = answer_text(one(records, "max_memory=9GB"), 140, colour=False)
    assert "failed: the quantize process was stopped" in " ".join(text.split())


def test_a_noisy_speed_is_said() -> None:
    records = rows()
    records[3] = changed(records[3], "timing_spread", value=0.4)
    answer = one(records, "min_decode_tokens_per_second=30", "max_perplexity_increase=3%")
    assert chosen(answer) == AWQ4
    assert answer.selection.choice is not None
    assert "not to be trusted, noisy timing: spread 40.0 %" in answer.selection.choice.why[-1]
    table = answer_text(answer, 160, colour=False).partition("qualifies")[2]
    assert table.count("noisy timing") == 1


def with_answers(record: Record, right: int) -> Record:
    answers = tuple(float(index < right) for index in range(200))
    return replace(record, values=(*record.values, score_of(TASK, "acc_norm", answers)))


def test_a_loss_of_a_task_is_in_points_or_a_share() -> None:
    records = [
        with_answers(record, right)
        for record, right in zip(rows(), (160, 160, 158, 155, 140, 60), strict=True)
    ]
    points = one(records, "max_hellaswag_loss=2 points")
    assert set(names(points, "qualifying")) == {"fp32", GPTQ8, RTN8}
    # 2.5 points of 80 are 3.1 % of it.
    assert AWQ4 in names(one(records, "max_hellaswag_loss=2.5points"), "qualifying")
    assert AWQ4 not in names(one(records, "max_hellaswag_loss=2.5%"), "qualifying")
    assert AWQ4 in names(one(records, "max_hellaswag_loss=3.2%"), "qualifying")
    assert "2.5 points" in answer_text(points, 160, colour=False)
    (row,) = [c for c in points.selection.misses if c.row.label == AWQ4]
    assert "95 % interval" in row.checks[0].note
    assert "the limit lies inside" in row.checks[0].note


def test_a_limit_inside_the_interval_is_said() -> None:
    answer = one(rows(), "max_perplexity_increase=0.3%")
    (row,) = [c for c in answer.selection.qualifying if c.row.label == RTN8]
    assert "the limit lies inside: more samples may decide otherwise" in row.checks[0].note
    (sure,) = [c for c in answer.selection.misses if c.row.label == GPTQ3]
    assert "the limit lies inside" not in sure.checks[0].note


def test_an_infinite_perplexity_breaks_every_limit() -> None:
    records = [*rows(), made("rtn", 3, 0.3, memory=3e9, speed=50)]
    records[-1] = changed(records[-1], "perplexity", value=math.inf, samples=())
    answer = one(records, "max_perplexity_increase=100%")
    assert names(answer, "misses") == ["rtn 3 bits g128"]
    text = answer_text(answer, 140, colour=False)
    assert "infinite" in text
    assert json.dumps(answer_json(answer), allow_nan=False)


def test_sizes_that_were_computed_are_said_to_be() -> None:
    sizes = (
        Value("size", "computed_bytes", "computed", 3.9e9, "B", None),
        Value("size", "computed_bits_per_weight", "computed", 4.16, "bits", None),
    )
    records = [replace(record, values=sizes) for record in rows()[3:4]]
    answer = one(records, "max_size=8GB", "max_bits_per_weight=5", "priority=size")
    assert chosen(answer) == AWQ4
    assert "computed, nothing was stored" in answer_text(answer, 140, colour=False)
    assert one(records, "max_memory=8GB").selection.choice is None


def test_models_and_hardware_are_answered_one_by_one() -> None:
    records = [*rows(), *Synthetic("other").grid(), *Synthetic(hardware="cuda").grid()]
    assert len(recommend(records, ["max_perplexity_increase=3%"])) == 3
    assert len(recommend(records, ["model=embedded"])) == 2
    assert len(recommend(records, ["model=embedded", "hardware=cpu"])) == 1
    with pytest.raises(ConditionError, match="no model of these was run on that hardware"):
        recommend(records, ["model=other", "hardware=cuda"])


def test_the_documents_stand_beside_the_choice() -> None:
    answer = one(rows(), "max_perplexity_increase=3%", "max_memory=6GB")
    assert chosen(answer) == AWQ4
    by_text = {piece.text: piece for piece in answer.pieces}
    assert by_text["awq bits=4"].state == "the choice"
    assert by_text["gguf_Q4_K_M"].state == "not run here"
    assert by_text["gptq bits=4"].state == "not run here"
    assert by_text["fp32"].state == "does not qualify"
    text = answer_text(answer, 160, colour=False)
    assert "agree with the choice" in text
    assert "chapter 27.4.5" in text
    assert "device cpu, 3 million parameters, what counts: accuracy, size" in text


@pytest.mark.parametrize(
    ("condition", "memory"),
    [
        ("max_size=1MB", "extreme"),
        ("max_size=3MB", "low"),
        ("max_size=5MB", None),
        ("max_memory=6MB", "ample"),
        ("max_bits_per_weight=3", "extreme"),
        ("min_size=1MB", None),
        ("max_kl=1", None),
    ],
)
def test_how_tight_the_memory_is(condition: str, memory: str | None) -> None:
    (group,) = make_groups(make_rows(rows()))
    assert case_of(group, read_conditions([condition], [])).memory == memory


@pytest.mark.parametrize(
    ("hardware", "environment", "device"),
    [
        ("cpu", {"device": "cpu"}, "cpu"),
        ("cuda", {"device": "cuda"}, "nvidia"),
        ("cuda_offload", {"device": "cuda"}, "mixed"),
        ("cpu", {"device": "cpu", "platform": "macOS-14.5-arm64-arm-64bit"}, "apple"),
    ],
)
def test_the_device_is_that_of_the_records(
    hardware: str, environment: dict[str, str], device: str
) -> None:
    records = [
        replace(r, config={**r.config, "hardware": hardware}, environment=environment)
        for r in rows()
    ]
    (group,) = make_groups(make_rows(records))
    assert case_of(group, read_conditions([], [])).device == device


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["max_memroy=8GB"], r"max_memroy is no condition; close: max_memory.*known are max_"),
        (["8GB"], "'8GB' is no condition: write key=value, as max_memory=8GB"),
        (["max_memory=8"], "max_memory=8 is 8 bytes: write 8GB or 8MB"),
        (["max_memory="], "is no condition: write key=value"),
        (["max_memory=8XB"], "max_memory=8XB cannot be read: write it as 8GB, 500MB or 2GiB"),
        (["max_memory=much"], "cannot be read"),
        (["max_ttft=2GB"], "write it as 2s or 200ms"),
        (["max_perplexity_increase=3"], "is a share of 300 %: write 3%"),
        (["min_decode_tokens_per_second=20%"], "write it as 20 or 0.5"),
        (["max_kl=1", "max_kl=2"], "max_kl is given twice"),
        (["model=a", "model=b"], "model is given twice"),
        (["max_helaswag_loss=2%"], "of no task that was run; close: hellaswag; tasks with scores"),
        (["max_hellaswag_loss=2"], r"write it as 2points \(of the score in percent\) or 2%"),
        (["execution=pack"], "it is one of packed, dequantized, simulated"),
        (["priority=fast"], "priority=fast names no priority: it is one of accuracy, speed"),
        (["method=,"], "method=, names no method"),
        (["model=embeded"], "no row has model=embeded; close: embedded; there are embedded"),
        (["hardware=cuda"], "no row has hardware=cuda"),
        (["method=gptq,awk"], "no row has method=awk; close: awq"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(given: list[str], said: str) -> None:
    records = [with_answers(record, 100) for record in rows()]
    with pytest.raises(ConditionError, match=said) as error:
        recommend(records, given)
    assert "\n" not in str(error.value)


def test_a_task_where_none_was_run_is_said() -> None:
    with pytest.raises(ConditionError, match="no row has any score"):
        read_conditions(["max_mmlu_loss=2%"], [])


def test_the_command_and_its_statuses(
    runs: Callable[[list[Record]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(runs(rows()))
    assert main([folder, "max_perplexity_increase=3%", "max_memory=6GB"]) == 0
    text = capsys.readouterr().out
    assert f"Choice: {AWQ4}" in text
    assert "\x1b" not in text
    assert main([folder, "max_memory=1GB"]) == 1
    assert "Nothing qualifies." in capsys.readouterr().out
    assert main([folder, "max_memory=1XB"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: max_memory=1XB cannot be read")
    assert main([f"{folder}/nowhere"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_several_groups_are_named_and_one_is_enough(
    runs: Callable[[list[Record]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(runs([*rows(), *Synthetic("other").grid()]))
    assert main([folder, "max_memory=5.5GB", "min_bits_per_weight=4", "max_size=2.5GB"]) == 0
    assert "has embedded on cpu and other on cpu" in capsys.readouterr().out


def test_the_same_as_data(
    runs: Callable[[list[Record]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(runs(rows()))
    assert main([folder, "--json", "max_memory=6GB", "max_perplexity_increase=3%"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["choice"]["label"] == AWQ4
    (entry,) = found["qualifying"]
    assert entry["limits"]["max_memory"]["value"] == 5e9
    assert entry["limits"]["max_memory"]["kept"] is True
    assert found["case"]["priorities"] == ["accuracy", "size"]
    assert found["misses"][0]["limits"]["max_perplexity_increase"]["kept"] is False
    assert {"advised", "state", "by", "command"} <= set(found["advice"][0])


def test_names_that_act_on_a_terminal_are_shown_as_text() -> None:
    records = [replace(r, config={**r.config, "model": "[red]\x1b[31m<script>"}) for r in rows()]
    text = answer_text(one(records, "max_memory=6GB"), 140, colour=False)
    assert "\x1b" not in text
    assert "[red]" in text
