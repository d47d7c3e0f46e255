"""The lm-eval adapter against lm-eval's own Hugging Face model on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.cache import Cache
from kernels.errors import ConfigError
from methods.engine import TorchEngine
from tests.architectures import BOS, tiny, tiny_tokenizer
from tests.harness.measures.surroundings import engine_of

LONG = "all the words of a text that is longer than the context of the model, and then some more"
SHOTS = "Question: one? Answer: two. "
"""Long enough to be read once for several questions."""


@pytest.fixture(scope="module")
def peer_class() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM


def adapter(
    model: Any, tokenizer: Any, batch_size: int = 4, cache: Cache | None = None, forks: bool = True
) -> Any:
    from harness.measures.lm_eval_model import EngineModel

    engine = model if isinstance(model, TorchEngine) else engine_of(model)
    engine._forks = forks
    return EngineModel(engine, tokenizer, batch_size, [], cache)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


class CountingEngine(TorchEngine):
    """Remembers the shape of every forward."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, "cpu", [])
        self.shapes: list[tuple[int, ...]] = []

    def prefill(
        self, input_ids: Tensor, cache: Any = None, last: int | None = None
    ) -> tuple[Tensor, Any]:
        self.shapes.append(tuple(input_ids.shape))
        return super().prefill(input_ids, cache, last)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("forks", [True, False])
def test_log_likelihoods_are_lm_evals_own(peer_class: Any, kind: str, forks: bool) -> None:
    model, tokenizer = tiny(kind), tiny_tokenizer()
    peer = peer_class(pretrained=model, tokenizer=tokenizer, batch_size=3)
    asked = requests(
        *[("Question: one or two? Answer:", f" {letter}") for letter in "ABCD"],
        *[(SHOTS + end, rest) for end in ("three?", "four?") for rest in (" a", " bcd", " bce")],
        (SHOTS, "and nothing else"),
        ("A context with a space behind ", "moved to the continuation"),
        ("", "no context at all"),
        ("", f"{BOS}led by BOS"),
        (f"{BOS}BOS is there already", " and not put twice"),
        (LONG, " and the end"),
        ("short", " " + LONG[:60]),
        ("the same", " text"),
        ("the same text", " text"),
    )
    expected = peer.loglikelihood(asked, disable_tqdm=True)
    for batch_size in (1, 4):
        found = adapter(model, tokenizer, batch_size, forks=forks).loglikelihood(asked)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [score for score, _ in found] == pytest.approx(
            [score for score, _ in expected], abs=1e-4
        )


def test_choices_of_one_token_are_one_row() -> None:
    engine = CountingEngine(tiny("llama"))
    # Bytes are tokens here: the letter is the last of two, so the contexts are equal up to it.
    asked = requests(*[("Answer:", f" {letter}") for letter in "ABCD"])
    adapter(engine, tiny_tokenizer()).loglikelihood(asked)
    assert [batch for batch, _ in engine.shapes] == [1]


def test_a_shared_beginning_is_read_once() -> None:
    engine, tokenizer = CountingEngine(tiny("llama")), tiny_tokenizer()
    asked = requests(*[(SHOTS, f"{letter} is the one") for letter in "ABCD"])
    adapter(engine, tokenizer).loglikelihood(asked)
    context = len(tokenizer.encode(SHOTS.rstrip()))
    rest = len(" A is the one")
    # The last token of the context is read with each continuation, whose last one is not read.
    assert engine.shapes == [(1, context - 1), (4, rest)]


def test_tokens_of_requests_are_shared_through_the_cache(tmp_path: Path) -> None:
    model, tokenizer, cache = tiny("llama"), tiny_tokenizer(), Cache(tmp_path)
    asked = requests(("one", " two"), ("one", " three"), ("", "four"), ("é ", "five"))
    first = adapter(model, tokenizer, cache=cache).loglikelihood(asked)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    second = adapter(model, tokenizer, cache=cache)
    second._encode = lambda *_: pytest.fail("encoded again")
    assert second.loglikelihood(asked) == first
    assert adapter(model, tokenizer).loglikelihood(asked) == first


def test_rows_that_influence_each_other_are_read_alone() -> None:
    engine, tokenizer = CountingEngine(tiny("llama")), tiny_tokenizer()
    engine.couples_rows = True
    asked = [(SHOTS, f"{letter} is the one") for letter in "ABCD"]
    adapter(engine, tokenizer).loglikelihood(requests(*asked))
    whole = len(tokenizer.encode(SHOTS + "A is the one")) - 1
    assert engine.shapes == [(1, whole)] * 4
    engine.shapes.clear()
    free = {"until": [], "max_gen_toks": 3}
    adapter(engine, tokenizer).generate_until(requests((SHOTS, free), (SHOTS + "one", free)))
    assert {batch for batch, _ in engine.shapes} == {1}


def test_rolling_log_likelihoods_are_lm_evals_own(peer_class: Any) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    peer = peer_class(pretrained=model, tokenizer=tokenizer, batch_size=1)
    asked = requests((LONG * 2,), ("short",))
    expected = peer.loglikelihood_rolling(asked, disable_tqdm=True)
    found = adapter(model, tokenizer).loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("forks", [True, False])
def test_generated_texts_are_lm_evals_own(peer_class: Any, forks: bool) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    peer = peer_class(pretrained=model, tokenizer=tokenizer, batch_size=1)
    free = {"until": [], "max_gen_toks": 12}
    prompts = ["one", "a longer prompt", "a prompt of middling size", LONG, f"{BOS}with BOS"]
    prompts += [SHOTS + "three?", SHOTS + "four and five?"]
    plain = requests(*[(prompt, free) for prompt in prompts])
    # A stop string that occurs: taken from what is written without one.
    stop = adapter(model, tokenizer).generate_until(plain[:1])[0][4:6]
    asked = [*plain, *requests(*[(p, {"until": [stop], "max_gen_toks": 20}) for p in prompts])]
    expected = peer.generate_until(asked, disable_tqdm=True)
    assert stop not in expected[len(prompts)]
    for batch_size in (1, 4):
        ours = adapter(model, tokenizer, batch_size, forks=forks)
        assert ours.generate_until(asked) == expected


def test_texts_that_have_ended_are_not_read_on() -> None:
    tokenizer = tiny_tokenizer()
    engine = CountingEngine(tiny("llama"))
    ours = adapter(engine, tokenizer)
    free = {"until": [], "max_gen_toks": 12}
    texts = ours.generate_until(requests(("one", free), ("six", free)))
    # The stop string ends the first text at once and stands nowhere in the second.
    stop = next(letter for letter in texts[0] if letter not in texts[1])
    engine.shapes.clear()
    ours.generate_until(
        requests(*[(p, {"until": [stop], "max_gen_toks": 12}) for p in ("one", "six")])
    )
    assert engine.shapes[0][0] == 2
    assert engine.shapes[-1] == (1, 1)


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


def test_a_chat_template_is_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    ours = adapter(tiny("llama"), tokenizer)
    messages = [{"role": "user", "content": "one?"}]
    with pytest.raises(ConfigError, match="no chat template; set apply_chat_template=false"):
        ours.apply_chat_template(messages)
    before = ours.tokenizer_name
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert ours.apply_chat_template(messages) == "<user>one?<assistant>"
    messages.append({"role": "assistant", "content": "two"})
    assert ours.apply_chat_template(messages, False) == "<user>one?<assistant>two"
    assert ours.tokenizer_name != before


def test_what_cannot_be_answered_is_one_sentence() -> None:
    ours = adapter(tiny("llama"), tiny_tokenizer())
    with pytest.raises(ConfigError, match="only greedy generation"):
        ours.generate_until(requests(("a", {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(ConfigError, match="generates up to 64 tokens, but the model reads 64"):
        ours.generate_until(requests(("a", {"max_gen_toks": 64})))
    with pytest.raises(ConfigError, match="a continuation of 70 tokens"):
        ours.loglikelihood(requests(("a", "b" * 70)))
