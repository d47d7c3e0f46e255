"""Greedy texts beside those of the unquantized model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.measures.generation import Generation, greedy
from kernels.errors import ConfigError
from tests.architectures import BOS_ID, CONTEXT, VOCABULARY, tiny, tiny_tokenizer
from tests.harness.measures.surroundings import (
    BigramEngine,
    by_metric,
    drawn_ids,
    engine_of,
    make_context,
)

MEASURE = Generation(prompts=3, prompt_length=6, new_tokens=10)


def test_the_model_itself_writes_the_same(tmp_path: Path) -> None:
    model = tiny("llama")
    ids = drawn_ids(100, 250)
    context = make_context(tmp_path, ids, BOS_ID, tiny_tokenizer())
    MEASURE.prepare(engine_of(model), context)
    values = by_metric(MEASURE.run(engine_of(model), context))
    assert values["equal_tokens"].value == 1.0
    assert values["equal_tokens"].samples == (1.0, 1.0, 1.0)
    assert values["first_difference"].value == 10
    assert values["equal_tokens"].protocol == "greedy_3x10"
    texts = context.details["generation"]
    assert len(texts) == 3
    assert all(entry["text"] == entry["reference"] for entry in texts)
    assert all(entry["prompt"].startswith("<s>") for entry in texts)


def test_greedy_is_what_transformers_generates() -> None:
    model, prompts = tiny("llama"), drawn_ids(12, VOCABULARY).view(2, 6)
    expected = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(greedy(engine_of(model), prompts, 10), expected[:, 6:])


def test_differences_are_counted(tmp_path: Path) -> None:
    # After token t comes t + 1; the other engine says 0 after 3.
    following = torch.eye(8).roll(1, dims=1)
    other = following.clone()
    other[3] = torch.eye(8)[0]
    context = make_context(tmp_path, torch.zeros(20, dtype=torch.int64), None, tiny_tokenizer())
    measure = Generation(prompts=2, prompt_length=4, new_tokens=6)
    measure.prepare(BigramEngine(following), context)
    values = by_metric(measure.run(BigramEngine(other), context))
    # Reference 1 2 3 4 5 6; engine 1 2 3 0 1 2.
    assert values["first_difference"].samples == (3.0, 3.0)
    assert values["equal_tokens"].value == 0.5
    assert values["equal_tokens"].stderr == 0.0


def test_prompts_depend_on_the_seed_only(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1000, 8))
    first, again = MEASURE._prompts(context), MEASURE._prompts(context)
    context.seed = 8
    other = MEASURE._prompts(context)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    text = context.texts.tokens("gptq").ids
    assert all(any(torch.equal(p, w) for w in text.unfold(0, 6, 1)) for p in first)


def test_too_many_tokens_and_too_short_a_text(tmp_path: Path) -> None:
    engine = engine_of(tiny("llama"))
    long = Generation(prompts=1, prompt_length=CONTEXT, new_tokens=1)
    with pytest.raises(ConfigError, match="is 65, but the model reads at most 64 tokens"):
        long.prepare(engine, make_context(tmp_path, drawn_ids(100, 8)))
    with pytest.raises(ConfigError, match="has 5 tokens, fewer than"):
        MEASURE.prepare(engine, make_context(tmp_path, drawn_ids(5, 8)))
    with pytest.raises(ConfigError, match="new_tokens is 0"):
        Generation(new_tokens=0)
