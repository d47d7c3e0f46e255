"""The lm-eval adapter against lm-eval's own Hugging Face model on the same checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.measures.tasks import Tasks
from kernels.errors import ConfigError
from tests.architectures import BOS, VOCABULARY, tiny, tiny_tokenizer
from tests.harness.measures.surroundings import drawn_ids, engine_of, make_context

EMBEDDED = Path(__file__).resolve().parents[3] / "harness" / "embedded" / "model"
QUESTIONS = 6
LONG = "all the words of a text that is longer than the context of the model, and then some more"


@pytest.fixture(scope="module")
def peer_class() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM


def adapter(model: Any, tokenizer: Any, batch_size: int = 4) -> Any:
    from harness.measures.lm_eval_model import EngineModel

    return EngineModel(engine_of(model), tokenizer, batch_size, [])


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def test_log_likelihoods_are_lm_evals_own(peer_class: Any) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    peer = peer_class(pretrained=model, tokenizer=tokenizer, batch_size=3)
    asked = requests(
        *[("Question: one or two? Answer:", f" {letter}") for letter in "ABCD"],
        ("A context with a space behind ", "moved to the continuation"),
        ("", "no context at all"),
        (f"{BOS}BOS is there already", " and not put twice"),
        (LONG, " and the end"),
        ("short", " " + LONG[:60]),
        ("the same", " text"),
        ("the same text", " text"),
    )
    expected = peer.loglikelihood(asked, disable_tqdm=True)
    for batch_size in (1, 4):
        found = adapter(model, tokenizer, batch_size).loglikelihood(asked)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [score for score, _ in found] == pytest.approx(
            [score for score, _ in expected], abs=1e-4
        )


def test_one_forward_for_choices_of_one_token() -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    ours = adapter(model, tokenizer)
    rows: list[int] = []
    read = ours._read
    ours._read = lambda batch, first: rows.append(len(batch)) or read(batch, first)
    # Bytes are tokens here: the letter is the last of two, so the contexts are equal up to it.
    ours.loglikelihood(requests(*[("Answer:", f" {letter}") for letter in "ABCD"]))
    assert rows == [1]


def test_rolling_log_likelihoods_are_lm_evals_own(peer_class: Any) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    peer = peer_class(pretrained=model, tokenizer=tokenizer, batch_size=1)
    asked = requests((LONG * 2,), ("short",))
    expected = peer.loglikelihood_rolling(asked, disable_tqdm=True)
    found = adapter(model, tokenizer).loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=1e-5)


def test_generated_texts_are_lm_evals_own(peer_class: Any) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    peer = peer_class(pretrained=model, tokenizer=tokenizer, batch_size=1)
    free = {"until": [], "max_gen_toks": 12}
    prompts = ["one", "a longer prompt", "a prompt of middling size", LONG, f"{BOS}with BOS"]
    plain = requests(*[(prompt, free) for prompt in prompts])
    # A stop string that occurs: taken from what is written without one.
    stop = adapter(model, tokenizer).generate_until(plain[:1])[0][4:6]
    asked = [*plain, *requests(*[(p, {"until": [stop], "max_gen_toks": 20}) for p in prompts])]
    expected = peer.generate_until(asked, disable_tqdm=True)
    assert stop not in expected[5]
    for batch_size in (1, 4):
        assert adapter(model, tokenizer, batch_size).generate_until(asked) == expected


def test_an_end_of_text_ends_the_text() -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    ours = adapter(model, tokenizer)
    asked = requests(("one", {"until": [], "max_gen_toks": 12}))
    prompt = torch.tensor([tokenizer.encode("one")])
    with torch.no_grad():
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )[0, prompt.shape[1] :].tolist()
    ours.stop_ids = frozenset({written[3]})
    expected = written[: written.index(written[3])]
    assert ours.generate_until(asked) == [tokenizer.decode(expected, skip_special_tokens=True)]


def test_what_cannot_be_answered_is_one_sentence() -> None:
    ours = adapter(tiny("llama"), tiny_tokenizer())
    with pytest.raises(ConfigError, match="only greedy generation"):
        ours.generate_until(requests(("a", {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(ConfigError, match="generates up to 64 tokens, but the model reads 64"):
        ours.generate_until(requests(("a", {"max_gen_toks": 64})))
    with pytest.raises(ConfigError, match="a continuation of 70 tokens"):
        ours.loglikelihood(requests(("a", "b" * 70)))


def test_embedded_tasks_are_scored_as_lm_eval_scores_them(tmp_path: Path, peer_class: Any) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    context = make_context(tmp_path, drawn_ids(1, 8), tokenizer=tokenizer)
    measure = Tasks(limit=QUESTIONS)
    values = {(v.protocol, v.metric): v for v in measure.run(engine_of(model), context)}
    loaded = TaskManager(include_defaults=False).load(measure._definitions(context))
    peer = peer_class(pretrained=model, tokenizer=tokenizer, batch_size=QUESTIONS)
    expected = evaluate(peer, loaded, limit=QUESTIONS, bootstrap_iters=0)["results"]
    assert {key: value.value for key, value in values.items()} == {
        ("embedded_endings_0shot_limit6", "acc"): expected["embedded_endings"]["acc,none"],
        ("embedded_endings_0shot_limit6", "acc_norm"): expected["embedded_endings"][
            "acc_norm,none"
        ],
        ("embedded_facts_5shot_limit6", "acc"): expected["embedded_facts"]["acc,none"],
        ("embedded_sums_3shot_limit6", "exact_match_strict"): expected["embedded_sums"][
            "exact_match,strict-match"
        ],
        ("embedded_sums_3shot_limit6", "exact_match_flexible"): expected["embedded_sums"][
            "exact_match,flexible-extract"
        ],
    }
    for value in values.values():
        assert len(value.samples) == QUESTIONS
        assert set(value.samples) <= {0.0, 1.0}
        assert value.value == pytest.approx(sum(value.samples) / QUESTIONS)
        spread = value.value * (1 - value.value) / QUESTIONS
        assert value.stderr == pytest.approx(math.sqrt(spread))


def test_few_shots_and_limits_are_checked_against_the_task(tmp_path: Path) -> None:
    model = tiny("llama")
    model.resize_token_embeddings(VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    context = make_context(tmp_path, drawn_ids(1, 8), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="embedded_endings has no worked examples"):
        Tasks(["embedded_endings"], num_fewshot=2).run(engine_of(model), context)
    with pytest.raises(ConfigError, match=r"limit is 100000, but embedded_facts has \d+ questions"):
        Tasks(["embedded_facts"], limit=100_000).run(engine_of(model), context)
    with pytest.raises(ConfigError, match="it must name some of embedded_endings"):
        Tasks(["hellaswag"])
    with pytest.raises(ConfigError, match="limit is 0"):
        Tasks(limit=0)


def test_stop_tokens_come_from_the_models_generation_config(tmp_path: Path) -> None:
    from harness.measures.tasks import _stop_ids

    assert _stop_ids(tmp_path) == []
    path = tmp_path / "generation_config.json"
    for text, ids in (
        ('{"eos_token_id": 5}', [5]),
        ('{"eos_token_id": [5, 6]}', [5, 6]),
        ("{}", []),
    ):
        path.write_text(text)
        assert _stop_ids(tmp_path) == ids
