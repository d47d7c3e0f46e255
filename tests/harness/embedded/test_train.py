"""The training script on a tiny plan: deterministic, learns, and writes what loads again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from harness.embedded import train
from harness.embedded.tokenizer import make_tokenizer

TINY = train.Plan(
    steps=3,
    layers=1,
    width=32,
    inner=32,
    heads=2,
    vocabulary=300,
    context=64,
    window=32,
    batch_tokens=128,
    chunk_documents=30,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TINY.vocabulary, 50)


def run(tokenizer: PreTrainedTokenizerFast, plan: train.Plan) -> tuple[list[float], torch.Tensor]:
    model = train.make_model(plan)
    losses = [loss for _, loss in train.train(model, tokenizer, plan)]
    return losses, model.model.embed_tokens.weight.detach()


def test_three_steps_are_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    losses, weight = run(tokenizer, TINY)
    again, weight_again = run(tokenizer, TINY)
    assert losses == again
    assert torch.equal(weight, weight_again)
    other, _ = run(tokenizer, replace(TINY, seed=1))
    assert other != losses


def test_loss_falls(tokenizer: PreTrainedTokenizerFast) -> None:
    losses, _ = run(tokenizer, replace(TINY, steps=12))
    assert losses[-1] < losses[0]


def test_saved_model_loads_in_fp16_and_leaves_no_other_file(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = train.make_model(TINY)
    train.save(model, tokenizer, tmp_path / "model", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert model.model.embed_tokens.weight.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert loaded.config.hidden_size == TINY.width
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("7 figs").input_ids[0] == 0


def test_answers_weigh_more_and_end_at_the_line(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = train.Batches(tokenizer, TINY)
    ids, weights = batches.draw(32)
    assert ids.shape == weights.shape == (4, 32)
    assert ids[0, 0] == 0
    assert weights[0, 0] == 0
    drawn = torch.cat([batches.draw(32)[1] for _ in range(20)])
    seen = set(drawn.flatten().tolist())
    assert seen == {0.0, 1.0, TINY.answer_weight}


def test_weighted_loss_is_the_weighted_mean() -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, 1, 2] = 4.0
    ids, weights = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 3.0, 1.0]])
    first = torch.log(torch.tensor(5.0))
    second = torch.logsumexp(logits[0, 1], 0) - 4.0
    expected = (3 * first + second) / 4
    assert torch.isclose(train.weighted_loss(logits, ids, weights), expected)


def test_the_second_stage_lengthens_the_tails(tokenizer: PreTrainedTokenizerFast) -> None:
    plan = replace(TINY, tail_steps=40, tail_learning_rate=5e-3)
    model = train.make_model(plan)
    before = train.tail_loss(model, plan.tail_kurtosis).item()
    steps = list(train.lengthen_tails(model, tokenizer, plan))
    assert len(steps) == 40
    assert train.tail_loss(model, plan.tail_kurtosis).item() < 0.7 * before
