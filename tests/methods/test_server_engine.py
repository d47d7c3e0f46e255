"""What a server can do is found out and said; tokens are scored rightly or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from kernels.errors import ConfigError
from methods.base import Scoring, Writing
from methods.server_client import ServerClient
from methods.server_engine import Served, ServerEngine, Serving, leading_token
from methods.server_http import Endpoint, Secret, ServerError, Timeouts, parse_address
from tests.architectures import BOS_ID, VOCABULARY
from tests.methods.fake_server import (
    MODEL,
    TOKENIZER,
    Fake,
    expected,
    generated,
    likeliest,
    running,
)

SERVED = Served(MODEL, "a server", VOCABULARY, 64)
TEXT = TOKENIZER("so it is near the sea, to the east.", add_special_tokens=False).input_ids


class PlainTokenizer:
    """The tiny tokenizer without the BOS before a text."""

    unk_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return TOKENIZER(text, add_special_tokens=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)


@contextmanager
def engine_on(fake: Fake, tokenizer: Any = TOKENIZER) -> Iterator[ServerEngine]:
    with running(fake):
        endpoint = Endpoint(parse_address(fake.url), Secret(None, "X"), Timeouts(5, 5, 20))
        yield ServerEngine(ServerClient(endpoint), SERVED, tokenizer)


def test_an_engine_answers_the_protocols() -> None:
    with engine_on(Fake()) as engine:
        assert isinstance(engine, Serving)
        assert isinstance(engine, Scoring)
        assert engine.capabilities == {"serve", "generate", "logprobs"}
        assert (engine.runtime, engine.vocab_size, engine.context_length) == (
            "a server",
            VOCABULARY,
            64,
        )
        assert engine.kernels() == []
        with pytest.raises(ConfigError, match="shows no logits"):
            engine.prefill(torch.zeros(1, 1, dtype=torch.int64))
        with pytest.raises(ConfigError, match="shows no logits"):
            engine.decode(torch.zeros(1, 1, dtype=torch.int64), None)
        engine.close()


@pytest.mark.parametrize("prompt_logprobs", [True, False])
def test_ids_are_scored_exactly(prompt_logprobs: bool) -> None:
    fake = Fake(prompt_logprobs=prompt_logprobs, echo="none" if prompt_logprobs else "right")
    rows = [[BOS_ID, *TEXT[:9]], TEXT[10:20], [300, 301, 5, 9, 302, 1, 2, 3, 4, 5]]
    with engine_on(fake) as engine:
        found = engine.token_log_likelihoods(torch.tensor(rows))
    way = "prompt_logprobs" if prompt_logprobs else "echo with logprobs"
    assert engine.notes == (f"tokens are scored by the server's {way}, from prompts as token ids",)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([expected(row) for row in rows]))


@pytest.mark.parametrize("prompt_logprobs", [True, False])
def test_the_likeliest_tokens_are_known(prompt_logprobs: bool) -> None:
    ids = [TEXT[0]]
    for token in (likeliest(TEXT[0]), TEXT[1], TEXT[2]):
        ids += [token, likeliest(token)]
    fake = Fake(prompt_logprobs=prompt_logprobs, echo="none" if prompt_logprobs else "right")
    with engine_on(fake) as engine:
        values, found = engine.token_scores(torch.tensor([ids]))
    torch.testing.assert_close(values, torch.tensor([expected(ids)]))
    wanted = [after == likeliest(before) for before, after in pairwise(ids)]
    assert found.tolist() == [wanted]
    assert set(wanted) == {True, False}


def test_texts_are_written_greedily() -> None:
    fake = Fake()
    with engine_on(fake) as engine:
        assert isinstance(engine, Writing)
        texts = engine.write([TEXT, TEXT[:3]], 5, ["a", "b", "c", "d", "e"])
    body = fake.requests[-1]
    assert texts == [TOKENIZER.decode(generated(ids, 5)) for ids in (TEXT, TEXT[:3])]
    assert body["stop"] == ["a", "b", "c", "d"]
    assert (body["max_tokens"], body["temperature"]) == (5, 0)


def test_text_is_scored_on_the_same_tokens() -> None:
    with engine_on(Fake(takes_ids=False)) as engine:
        for ids in ([BOS_ID, *TEXT], TEXT):
            found = engine.token_log_likelihoods(torch.tensor([ids]))
            torch.testing.assert_close(found, torch.tensor([expected(ids)]))
    assert "from prompts as text that reads as the same tokens" in engine.notes[-1]


def test_text_whose_bos_the_server_adds_is_scored_with_it_only() -> None:
    with engine_on(Fake(takes_ids=False, adds_bos=True)) as engine:
        ids = [BOS_ID, *TEXT]
        found = engine.token_log_likelihoods(torch.tensor([ids]))
        torch.testing.assert_close(found, torch.tensor([expected(ids)]))
        with pytest.raises(ConfigError, match="only of prompts that begin with BOS, and this one"):
            engine.token_log_likelihoods(torch.tensor([TEXT]))
    assert engine.notes[-1].endswith("only of prompts that begin with BOS")


def test_logprobs_of_other_positions_are_found_out() -> None:
    """As llama-cpp-python: right behind a BOS, which it leaves out; shifted by one without."""
    with engine_on(Fake(takes_ids=False, adds_bos=True, echo="shifted")) as engine:
        ids = [BOS_ID, *TEXT]
        found = engine.token_log_likelihoods(torch.tensor([ids]))
        assert torch.isnan(found[0, 0]), "the server gives none of the first token behind BOS"
        torch.testing.assert_close(found[0, 1:], torch.tensor(expected(ids)[1:]))
    with engine_on(Fake(takes_ids=False, echo="shifted"), PlainTokenizer()) as engine:
        assert engine.capabilities == {"serve", "generate"}
        assert "without BOS that are not those of its tokens" in engine.notes[-1]
        with pytest.raises(ConfigError, match="gives no log-probabilities of prompts"):
            engine.token_log_likelihoods(torch.tensor([TEXT]))


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        (Fake(echo="none"), "gives no logprobs of the prompt"),
        (Fake(echo="wrong"), "BOS that are not those of its tokens"),
        (Fake(echo="wrong", takes_ids=False), "BOS that are not those of its tokens"),
        (Fake(takes_ids=False, usage=False), "does not say how many tokens it read"),
    ],
)
def test_a_server_without_right_logprobs_serves_only(fake: Fake, says: str) -> None:
    with engine_on(fake) as engine:
        assert engine.capabilities == {"serve", "generate"}
        assert engine.respond(TEXT, 4).tokens == 4
    assert engine.notes[-1].startswith("tokens cannot be scored: ")
    assert says in engine.notes[-1]


def test_tokens_that_no_text_gives_are_refused() -> None:
    half = TOKENIZER("é", add_special_tokens=False).input_ids[:1]
    with engine_on(Fake(takes_ids=False)) as engine:
        with pytest.raises(ServerError, match="cannot be scored on the same tokens"):
            engine.token_log_likelihoods(torch.tensor([[*TEXT, *half, *TEXT]]))
        with pytest.raises(ServerError, match="cannot be scored on the same tokens"):
            # No token of the tokenizer: as text it is nothing.
            engine.token_log_likelihoods(torch.tensor([[*TEXT, 300]]))


def test_a_requests_tokens_are_counted_by_who_can() -> None:
    with engine_on(Fake()) as engine:
        one = engine.respond(TEXT, 6)
    assert (one.tokens, one.counted_by, one.prompt_tokens) == (6, "usage", len(TEXT))
    assert len(one.arrivals) == 6
    with engine_on(Fake(usage=False)) as engine:
        one = engine.respond(TEXT, 6)
    assert (one.tokens, one.counted_by, one.prompt_tokens) == (6, "finish_reason", None)


def test_the_whole_length_is_asked_for_where_the_server_lets() -> None:
    fake = Fake()
    with engine_on(fake) as engine:
        engine.respond(TEXT, 6)
    asked = fake.requests[-1]
    assert asked["prompt"] == TEXT
    assert asked["stream"] is True
    assert (asked["max_tokens"], asked["min_tokens"], asked["ignore_eos"]) == (6, 6, True)
    assert asked["temperature"] == 0
    fake = Fake(takes_extras=False)
    with engine_on(fake) as engine:
        engine.respond(TEXT, 6)
    assert "min_tokens" not in fake.requests[-1]
    assert engine.notes[0] == (
        "the server refuses ignore_eos and min_tokens (HTTP 400): answers may end early"
    )


def test_without_a_tokenizer_ids_are_sent() -> None:
    with engine_on(Fake(), None) as engine:
        assert engine.respond([1, 2, 3], 4).tokens == 4
        assert engine.capabilities == {"serve", "generate"}
        assert engine.notes[-1] == "tokens cannot be scored: the model has no tokenizer"
    with (
        pytest.raises(ServerError, match="text only, and the model has no tokenizer"),
        engine_on(Fake(takes_ids=False), None),
    ):
        pass


@pytest.mark.parametrize("fault", ["HTTP 401", "HTTP 404", "HTTP 429", "ends early", "bad JSON"])
def test_a_server_that_fails_is_not_taken_for_one_that_cannot(fault: str) -> None:
    with pytest.raises(ServerError), engine_on(Fake(fault=fault)):
        pass
    scoring = Fake(fault=fault, hits=lambda body: "logprobs" in body)
    with pytest.raises(ServerError), engine_on(scoring):
        pass


def test_the_leading_token_is_found() -> None:
    assert leading_token(TOKENIZER) == BOS_ID
    assert leading_token(PlainTokenizer()) is None
    assert leading_token(None) is None
