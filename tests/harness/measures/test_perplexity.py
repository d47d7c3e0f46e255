"""Perplexity under both protocols against plain computations of the same figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from harness.measures import windows
from harness.measures.perplexity import Perplexity
from kernels.errors import ConfigError
from tests.architectures import VOCABULARY, tiny
from tests.harness.measures.surroundings import (
    BigramEngine,
    drawn_ids,
    drawn_table,
    engine_of,
    make_context,
)


def test_gptq_protocol_is_the_mean_of_the_models_own_losses(tmp_path: Path) -> None:
    model, ids = tiny("llama"), drawn_ids(3 * 16 + 5, VOCABULARY)
    with torch.no_grad():
        losses = [
            float(model(input_ids=part[None], labels=part[None]).loss)
            for part in ids[:48].split(16)
        ]
    context = make_context(tmp_path, ids)
    (value,) = Perplexity("gptq", seq_len=16).run(engine_of(model), context)
    assert value.protocol == "text_gptq_16"
    assert value.value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert value.samples == pytest.approx(losses, rel=1e-5)
    spread = torch.tensor(losses, dtype=torch.float64).std() / math.sqrt(3)
    assert value.stderr == pytest.approx(value.value * float(spread), rel=1e-4)


def test_windows_read_together_or_alone_give_the_same(tmp_path: Path) -> None:
    engine, context = engine_of(tiny("llama")), make_context(tmp_path, drawn_ids(80, VOCABULARY))
    alone, together = (
        Perplexity("gptq", seq_len=16, batch_size=size).run(engine, context)[0] for size in (1, 3)
    )
    assert together.samples == pytest.approx(alone.samples, rel=1e-5)


def test_the_length_is_2048_or_the_models_context(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(5000, 8))
    table = drawn_table(8)
    for length, expected in ((4096, "text_gptq_2048"), (300, "text_gptq_300")):
        (value,) = Perplexity("gptq").run(BigramEngine(table, length), context)
        assert value.protocol == expected


class ScoringEngine(BigramEngine):
    """Scores tokens and shows no logits, as a server does."""

    capabilities = frozenset({"logprobs"})

    def token_log_likelihoods(self, input_ids: Tensor) -> Tensor:
        every = self.table[input_ids[:, :-1]].log_softmax(-1)
        return every.gather(2, input_ids[:, 1:, None])[..., 0]

    def token_scores(self, input_ids: Tensor) -> NoReturn:
        pytest.fail("perplexity asks for no choices")

    def prefill(self, *_: object, **__: object) -> NoReturn:
        pytest.fail("a server has no logits")


@pytest.mark.parametrize("protocol", ["gptq", "llamacpp"])
def test_scored_tokens_give_what_logits_give(tmp_path: Path, protocol: str) -> None:
    context, table = make_context(tmp_path, drawn_ids(100, 8), bos=1), drawn_table(8)
    (scored,) = Perplexity(protocol, seq_len=20).run(ScoringEngine(table), context)
    (value,) = Perplexity(protocol, seq_len=20).run(BigramEngine(table), context)
    assert scored.samples == pytest.approx(value.samples, rel=1e-5)
    assert scored.protocol == value.protocol


def test_a_limited_run_says_so(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(100, 8))
    engine = BigramEngine(drawn_table(8))
    (value,) = Perplexity("gptq", seq_len=10, windows=4).run(engine, context)
    assert value.protocol == "text_gptq_10_first4"
    assert len(value.samples) == 4
    (value,) = Perplexity("gptq", seq_len=10, windows=10).run(engine, context)
    assert value.protocol == "text_gptq_10"


@pytest.mark.parametrize("bos", [None, 3])
def test_llamacpp_scores_positions_256_to_510_behind_bos(tmp_path: Path, bos: int | None) -> None:
    ids, table = drawn_ids(2 * 512 + 100, 8), drawn_table(8)
    engine = BigramEngine(table)
    (value,) = Perplexity("llamacpp").run(engine, make_context(tmp_path, ids, bos))
    assert value.protocol == "text_llamacpp_512"
    log_probabilities = table.double().log_softmax(-1)
    total = 0.0
    for start in (0, 512):
        for position in range(256, 511):
            token, following = ids[start + position], ids[start + position + 1]
            total -= float(log_probabilities[token, following])
    assert value.value == pytest.approx(math.exp(total / (2 * 255)), rel=1e-6)
    assert [int(read[0, 0]) for read in engine.read] == (
        [bos, bos] if bos is not None else [int(ids[0]), int(ids[512])]
    )
    assert all(read.shape == (1, 512) for read in engine.read)
    assert torch.equal(engine.read[1][0, 1:], ids[513:1024])


def test_logits_beyond_the_bound_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, context = tiny("llama"), make_context(tmp_path, drawn_ids(64, VOCABULARY))
    for measure in (Perplexity("gptq", seq_len=32), Perplexity("llamacpp", seq_len=32)):
        (whole,) = measure.run(engine_of(model), context)
        with monkeypatch.context() as patch:
            patch.setattr(windows, "LOGITS_BYTES", 7 * VOCABULARY * 4)
            patch.setattr(windows, "PIECE_BYTES", 3 * VOCABULARY * 4)
            (pieces,) = measure.run(engine_of(model), context)
        assert pieces.samples == pytest.approx(whole.samples, rel=1e-5)


def test_an_overflowing_loss_and_nan_are_results(tmp_path: Path) -> None:
    context = make_context(tmp_path, torch.tensor([0, 1] * 8))
    sure = torch.tensor([[0.0, -1e6], [-1e6, 0.0]])
    (value,) = Perplexity("gptq", seq_len=4).run(BigramEngine(sure), context)
    assert value.value == math.inf
    assert value.stderr is None
    (value,) = Perplexity("gptq", seq_len=4).run(BigramEngine(sure * math.nan), context)
    assert math.isnan(value.value)


def test_a_text_shorter_than_one_window_is_one_sentence(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(9, 8))
    with pytest.raises(ConfigError, match=r"has 9 tokens, less than one window of 10") as error:
        Perplexity("gptq", seq_len=10).run(BigramEngine(drawn_table(8)), context)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="reads at most 1024 tokens"):
        Perplexity("gptq", seq_len=1025).run(BigramEngine(drawn_table(8)), context)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"protocol": "lm_eval"}, "protocol is 'lm_eval'; it must be one of gptq, llamacpp"),
        ({"protocol": "gptq", "seq_len": 1}, "seq_len is 1"),
        ({"protocol": "gptq", "windows": 0}, "windows is 0"),
        ({"protocol": "gptq", "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Perplexity(**options)  # type: ignore[arg-type]
