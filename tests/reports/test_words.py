from __future__ import annotations

import math

import pytest

from reports import protocols, words


@pytest.mark.parametrize(
    ("metric", "values", "unit", "texts"),
    [
        ("artefact_bytes", [3_230_000, 12e6], "MB", ["3.23", "12.00"]),
        ("artefact_bytes", [3.9e9, 13.5e9], "GB", ["3.90", "13.50"]),
        ("ttft_seconds", [0.0164, 0.0251], "ms", ["16.4", "25.1"]),
        ("decode_tokens_per_second", [106.4, 1411.2], "tokens/s", ["106", "1,411"]),
        ("copy_bytes_per_second", [9.1e9], "GB/s", ["9.10"]),
        ("bits_per_weight", [4.25, 32.0], "", ["4.25", "32.00"]),
        ("top1_agreement", [0.9994, 0.2236], "%", ["99.94", "22.36"]),
        ("acc", [0.5, 0.8133], "%", ["50.0", "81.3"]),
        ("exact_match_strict", [0.25], "%", ["25.0"]),
        ("decode_speedup", [0.6, 12.0], "×", ["0.60", "12.00"]),
        ("delta_p_mean", [-0.0123, 0.05], "%", ["-1.23", "+5.00"]),
        ("perplexity", [5.683, 1234.5, 4.2e7], "", ["5.683", "1,234", "4.2e+07"]),
        ("kl_mean", [1e-6, 0.000493, 1.5], "", ["1.0e-06", "0.000493", "1.500"]),
        ("nonfinite_logits", [0, 12345], "", ["0", "1.234e+04"]),
    ],
)
def test_a_column_has_one_unit_and_enough_digits(
    metric: str, values: list[float], unit: str, texts: list[str]
) -> None:
    found = words.column_format(metric, values)
    assert found.unit == unit
    assert [found.write(value) for value in values] == texts


def test_infinity_and_nan_are_written_in_words() -> None:
    write = words.column_format("perplexity", [math.inf, math.nan, 6.0]).write
    assert [write(value) for value in (math.inf, math.nan, 6.0)] == ["infinite", "NaN", "6.000"]


def test_zero_is_a_figure() -> None:
    assert words.column_format("kl_mean", [0.0]).write(0.0) == "0.0"
    assert words.column_format("kl_mean", [0.0, 1e-7]).write(0.0) == "0"


def test_a_standard_error_has_the_unit_of_its_column() -> None:
    found = words.column_format("acc", [0.8])
    assert found.spread(0.039) == "± 3.9"
    assert found.spread(None) == found.spread(math.inf) == ""


def test_ratios_to_the_baseline() -> None:
    assert [words.ratio(r) for r in (0.272, 2.5, 123.4, 3e6)] == [
        "×0.27",
        "×2.50",
        "×123",
        "×3e+06",
    ]
    assert [words.increase(r) for r in (1.0002, 1.031, 0.99, 89.0)] == [
        *("+0.02 %", "+3.1 %", "-1.0 %", "×89"),
    ]
    assert words.points(-0.02) == "-2.0 points"
    assert words.ratio(math.inf) == words.increase(math.nan) == ""


@pytest.mark.parametrize(
    ("protocol", "parts"),
    [
        ("wikitext2_gptq_2048", ("GPTQ protocol", "wikitext2", "2048 tokens")),
        ("embedded_gptq_1024_first4", ("windows of 1024", "only the first 4 windows")),
        ("wikitext2_llamacpp_512", ("llama.cpp protocol", "second half")),
        ("hellaswag_0shot", ("task hellaswag", "0 examples")),
        ("mmlu_5shot_chat", ("task mmlu with 5 examples", "in the model's chat template")),
        ("mix_0-5shot_limit10-all", ("task mix", "0-5 examples", "first 10 or all questions")),
        ("mmlu_5shot_limit100", ("task mmlu", "first 100 questions of each part")),
        ("greedy_8x64", ("8 prompts", "64 tokens")),
        ("prompt128_depth512_batch1", ("128 tokens", "512 tokens of context", "1 sequence at")),
        ("process_peak", ("resident memory",)),
        ("process_peak_depth128", ("resident memory", "read 128 tokens")),
        ("stored", ("on disk",)),
        ("computed", ("Arithmetic",)),
        ("somebody_elses", ("As the measure",)),
    ],
)
def test_each_protocol_is_said_in_one_sentence(protocol: str, parts: tuple[str, ...]) -> None:
    sentence = protocols.protocol_sentence(protocol)
    assert all(part in sentence for part in parts)
    assert sentence.endswith(".")
    assert "{" not in sentence


def test_a_limited_run_is_a_screening() -> None:
    assert protocols.screening("facts_5shot_limit100") == "screening: first 100 questions"
    assert protocols.screening("embedded_gptq_1024_first1") == "screening: first 1 window"
    assert protocols.screening("embedded_gptq_1024") == ""
    assert protocols.screening("mix_0-5shot_limit10-all") == "screening: first 10 or all questions"


@pytest.mark.parametrize(
    "protocol",
    [
        *("my_2shot_task_5shot", "my_2shot_task_0-5shot_chat_limit10-all"),
        "my_2shot_task_5shot_chat_multiturn_system0a1b2c_limit100",
    ],
)
def test_the_task_of_a_protocol(protocol: str) -> None:
    assert protocols.task_of(protocol) == "my_2shot_task"


def test_natural_order_counts() -> None:
    names = ["batch16", "batch4", "batch1"]
    assert sorted(names, key=words.natural) == ["batch1", "batch4", "batch16"]


def test_one_line_keeps_terminals_safe() -> None:
    assert "\x1b" not in words.one_line("a\x1b[31m\nb")
    assert words.one_line("a\n  b\tc") == "a b c"
