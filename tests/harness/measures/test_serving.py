"""Serving is what clients see: every request counted, every prompt another, failures said."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from harness.context import Context
from harness.measures.serving import Serving
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.server_engine import Completion
from methods.server_http import ServerError
from tests.harness.measures.surroundings import drawn_ids, make_context

SMALL = {"prompt_length": 8, "new_tokens": 5, "warmup": 1}


class Served:
    """An engine whose answers take known times; some requests fail."""

    capabilities = frozenset({"serve"})
    runtime = "a server"
    vocab_size = 100
    context_length = 64

    def __init__(self, fails: Sequence[int] = (), together: int = 0) -> None:
        self.notes: tuple[str, ...] = ("a note",)
        self.fails = set(fails)
        self.gate = threading.Barrier(together) if together else None
        self.prompts: list[tuple[int, ...]] = []
        self.lock = threading.Lock()

    def respond(self, prompt: Sequence[int], new_tokens: int) -> Completion:
        with self.lock:
            number = len(self.prompts)
            self.prompts.append(tuple(prompt))
        if self.gate is not None:
            self.gate.wait(20)
        if number in self.fails:
            raise ServerError("the server broke off its answer")
        first = 0.5 + number
        arrivals = tuple(first + 0.25 * piece for piece in range(new_tokens))
        return Completion(arrivals, new_tokens, "usage", len(prompt))


def measured(measure: Serving, engine: Any, context: Context) -> dict[str, dict[str, Value]]:
    found: dict[str, dict[str, Value]] = defaultdict(dict)
    for value in measure.run(engine, context):
        assert value.measure == "serving"
        found[value.protocol][value.metric] = value
    return dict(found)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return make_context(tmp_path, drawn_ids(500, 100), bos=None, tokenizer="any")


def test_each_level_has_its_figures(context: Context) -> None:
    engine = Served()
    found = measured(Serving(concurrency=(1, 4), requests=6, **SMALL), engine, context)
    assert set(found) == {f"prompt8_new5_concurrency{clients}" for clients in (1, 4)}
    for number, level in enumerate(found.values()):
        assert set(level) == {
            "ttft_seconds",
            "ttft_p99_seconds",
            "tpot_seconds",
            "serving_tokens_per_second",
            "requests_per_second",
            "failed_requests",
            "failed_share",
        }
        first = level["ttft_seconds"]
        # Requests are numbered: the warm-up has 0, then six a level.
        assert sorted(first.samples) == [0.5 + 1 + 6 * number + i for i in range(6)]
        assert first.value == median(first.samples)
        assert level["ttft_p99_seconds"].value == max(first.samples)
        assert level["tpot_seconds"].value == pytest.approx(0.25)
        assert len(level["tpot_seconds"].samples) == 6
        assert level["failed_requests"].value == 0
        assert level["failed_share"].value == 0
        tokens, rate = level["serving_tokens_per_second"], level["requests_per_second"]
        assert tokens.value == pytest.approx(5 * rate.value)
        assert tokens.higher_is_better
        assert not first.higher_is_better


def test_so_many_requests_are_under_way_at_once(context: Context) -> None:
    for clients in (1, 3, 16):
        # No request is answered before so many are there.
        engine = Served(together=clients)
        options = {**SMALL, "warmup": 0, "requests": 2 * clients}
        level = measured(Serving(concurrency=(clients,), **options), engine, context)
        assert level[f"prompt8_new5_concurrency{clients}"]["failed_requests"].value == 0
        assert len(engine.prompts) == 2 * clients


def test_more_clients_send_more_requests() -> None:
    measure = Serving()
    assert [measure.requests_at(clients) for clients in (1, 4, 16, 64)] == [8, 8, 32, 128]


def test_there_are_at_least_as_many_requests_as_clients(context: Context) -> None:
    engine = Served()
    measured(Serving(concurrency=(16,), requests=2, **SMALL), engine, context)
    assert len(engine.prompts) == 1 + 16


def test_prompts_are_all_different_and_led_by_bos(tmp_path: Path) -> None:
    ids = drawn_ids(300, 100)
    text = make_context(tmp_path, torch.cat([torch.tensor([7]), ids]), bos=7, tokenizer="any")
    engine = Served()
    measured(Serving(concurrency=(1, 4, 16), **SMALL), engine, text)
    assert len(set(engine.prompts)) == len(engine.prompts) == 1 + 8 + 8 + 32
    whole = ids.tolist()
    for prompt in engine.prompts:
        assert len(prompt) == 8
        assert prompt[0] == 7
        assert any(list(prompt[1:]) == whole[at : at + 7] for at in range(len(whole)))
    assert text.details["serving"]["prompts"] == "all different, cut from the evaluation text"


def test_without_a_tokenizer_tokens_are_drawn(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(4, 100))
    engine = Served()
    measured(Serving(concurrency=(1,), **SMALL), engine, context)
    assert len(set(engine.prompts)) == 9
    assert all(0 <= token < 100 for prompt in engine.prompts for token in prompt)
    assert context.details["serving"]["prompts"] == "all different, drawn tokens"


def test_failures_are_counted_and_said(context: Context) -> None:
    engine = Served(fails=[2, 5])
    level = measured(Serving(concurrency=(2,), requests=8, **SMALL), engine, context)[
        "prompt8_new5_concurrency2"
    ]
    assert level["failed_requests"].value == 2
    assert level["failed_share"].value == 0.25
    assert len(level["ttft_seconds"].samples) == 6
    assert level["requests_per_second"].value > 0
    details = context.details["serving"]
    assert details["server"] == ["a note"]
    assert details["levels"][0]["failures"] == {"the server broke off its answer": 2}
    assert details["levels"][0]["tokens_counted_by"] == {"usage": 6}
    assert details["levels"][0]["output_tokens"] == 30
    assert details["levels"][0]["prompt_tokens_of_server"] == [8, 8]
    assert details["levels"][0]["client_cpu_share"] >= 0


def test_a_level_without_any_answer_fails_and_ends_early(context: Context) -> None:
    engine = Served(fails=range(1, 1000))
    with pytest.raises(ConfigError) as raised:
        Serving(concurrency=(1,), requests=50, **SMALL).run(_engine(engine), context)
    assert str(raised.value) == (
        "none of 3 requests at prompt8_new5_concurrency1 was answered: "
        "the server broke off its answer"
    )
    assert len(engine.prompts) == 1 + 3


def test_a_failing_warm_up_fails_the_measure(context: Context) -> None:
    with pytest.raises(ServerError, match="broke off"):
        Serving(concurrency=(1,), **SMALL).run(_engine(Served(fails=[0])), context)


def test_a_mistake_of_ours_is_no_failure_of_the_server(context: Context) -> None:
    class Broken(Served):
        def respond(self, prompt: Sequence[int], new_tokens: int) -> Completion:
            if self.prompts:
                raise RuntimeError("a mistake")
            return super().respond(prompt, new_tokens)

    with pytest.raises(RuntimeError, match="a mistake"):
        Serving(concurrency=(2,), **SMALL).run(_engine(Broken()), context)


def test_tpot_needs_two_pieces(context: Context) -> None:
    class OnePiece(Served):
        def respond(self, prompt: Sequence[int], new_tokens: int) -> Completion:
            return Completion((0.5,), new_tokens, "usage", None)

    level = measured(Serving(concurrency=(1,), **SMALL), OnePiece(), context)
    metrics = level["prompt8_new5_concurrency1"]
    assert "tpot_seconds" not in metrics
    assert metrics["ttft_seconds"].value == 0.5


def test_what_does_not_fit_is_refused(context: Context, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"asks for 60 \+ 5 tokens.*context of 64"):
        Serving(prompt_length=60, new_tokens=5).run(_engine(Served()), context)
    short = make_context(tmp_path, drawn_ids(20, 100), tokenizer="any")
    with pytest.raises(ConfigError, match="has 20 tokens, too few for 15 different prompts of 8"):
        Serving(concurrency=(1,), requests=14, **SMALL).run(_engine(Served()), short)


def test_an_engine_that_answers_no_requests_is_refused(context: Context) -> None:
    from tests.harness.measures.surroundings import BigramEngine, drawn_table

    with pytest.raises(ConfigError, match=r"the engine \(table\) answers no requests"):
        Serving().run(_engine(BigramEngine(drawn_table(5))), context)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"concurrency": []}, r"concurrency is \[\]"),
        ({"concurrency": [4, 0]}, r"concurrency is \[4, 0\]"),
        ({"prompt_length": 0}, "prompt_length is 0"),
        ({"new_tokens": 1}, "new_tokens is 1; it must be 2 or more"),
        ({"requests": 0}, "requests is 0"),
        ({"warmup": -1}, "warmup is -1"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Serving(**options)


def _engine(engine: Any) -> Engine:
    typed: Engine = engine
    return typed
