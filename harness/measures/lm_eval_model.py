"""An engine as a model of lm-eval (0.4.13), with the tokenization rules of its own HF model.

Source of the rules: `lm_eval.models.huggingface.HFLM` and `lm_eval.api.model.TemplateLM`. Rows
that differ in their last token only (choices of one token after a question) are one row, rows that
begin alike are read on from one cache (`harness.measures.reading`), and the tokens of a set of
requests are kept in the sweep's cache, so that the cells of a model share them. This module imports
lm_eval, so `harness.measures.tasks` imports it only to run.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

import lm_eval.utils
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from harness.cache import Cache
from harness.data import tokenizer_digest
from harness.measures.reading import RowReader, couples_rows, write_greedily
from harness.measures.request_tokens import Pair, TokenPair, packed, unpacked
from harness.measures.shared_prefix import Row
from harness.record import digest
from kernels.errors import ConfigError
from methods.base import Engine, Scoring, Writing

Request = tuple[Any, list[int], list[int]]
"""What lm-eval calls the request, the context's tokens, the continuation's tokens."""

Score = tuple[float, bool]
"""Log-likelihood of the continuation in nats; whether greedy decoding would have written it."""

MAX_GEN_TOKS = 256
"""Tokens that a task which says nothing of it lets a model write: lm-eval's own default."""

OVERHEAD = {"cpu": 16, "cuda": 256}
"""Tokens that take about as long to compute as the weights take to be read."""

TOKENIZED = "requests"

ENCODED_AT_ONCE = 4096
"""Requests whose texts and tokens are held at once while they are encoded."""


class EngineModel(TemplateLM):  # type: ignore[misc]  # lm_eval carries no types
    """Answers lm-eval's three kinds of request through an engine.

    Args:
        engine: shows logits and continues caches, or else is `Scoring` and `Writing`.
        tokenizer: the model's Hugging Face tokenizer.
        batch_size: sequences read at once.
        stop_ids: tokens that end a text, beside the tokenizer's own end of text.
        cache: where the tokens of requests are kept; None keeps none.
        device: where the engine computes, `cpu` or `cuda`.
    """

    backend = "causal"

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        batch_size: int,
        stop_ids: Iterable[int],
        cache: Cache | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = tokenizer
        self.batch_size = 1 if couples_rows(engine) else batch_size
        self.stop_ids = frozenset(stop_ids) | {self.eot_token_id}
        self.cache = cache
        self.overhead = OVERHEAD[device]
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text; raises ConfigError where it has none."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "tasks need a tokenizer with a token for the end of a text, and the model's has "
                "none (a model of characters); take a suite without tasks, such as suite=quality"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or else the end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Most tokens the engine reads."""
        return self.engine.context_length

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer, chat template included."""
        return digest([tokenizer_digest(self.tokenizer), self.tokenizer.chat_template])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages as the tokenizer's own chat template writes them.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "the model's tokenizer has no chat template; set apply_chat_template=false"
            )
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the tokens of `string`, special ones as the tokenizer adds them by itself."""
        known = self._encoded.get(string) if add_special_tokens is None else None
        return self._encode([string], add_special_tokens)[0] if known is None else known

    def _encode(self, strings: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Return the tokens of each string; a tokenizer of its own threads is given many at once.

        A text that begins with BOS gets no second one.
        """
        prefix = self.tokenizer.decode(self.prefix_token_id)
        led = [special is None and string.startswith(prefix) for string in strings]
        found: list[list[int]] = [[] for _ in strings]
        for of_led in (False, True):
            places = [place for place, one in enumerate(led) if one is of_led]
            if places:
                texts = [strings[place] for place in places]
                options = {} if special is None else {"add_special_tokens": special}
                options = {"add_special_tokens": False} if of_led else options
                ids = self.tokenizer(texts, **options, verbose=False).input_ids
                for place, tokens in zip(places, ids, strict=True):
                    found[place] = tokens
        return found

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Score]:
        """Score continuations behind contexts; encoding is lm-eval's own."""
        pairs: list[Pair] = [request.args for request in requests]
        tokens = self._kept_tokens(pairs)
        return self._loglikelihood_tokens(
            [(pair, *both) for pair, both in zip(pairs, tokens, strict=True)]
        )

    def _kept_tokens(self, pairs: Sequence[Pair]) -> list[TokenPair]:
        """Return (context, continuation) as tokens, from the cache where they are there."""
        if self.cache is None:
            return self._encode_pairs(pairs)
        state = hashlib.sha256()
        for text in itertools.chain.from_iterable(pairs):
            state.update(f"{len(text)}:".encode() + text.encode())
        key = [
            state.hexdigest(),
            tokenizer_digest(self.tokenizer),
            [metadata.version(name) for name in ("lm_eval", "tokenizers", "transformers")],
        ]
        return unpacked(
            self.cache.get(TOKENIZED, key, lambda: packed(pairs, self._encode_pairs(pairs)))
        )

    def _encode_pairs(self, pairs: Sequence[Pair]) -> list[TokenPair]:
        """Return (context, continuation) as tokens by `TemplateLM`'s rules.

        The texts that `_encode_pair` will ask for are encoded before, many at once.
        """
        found: list[TokenPair] = []
        for start in range(0, len(pairs), ENCODED_AT_ONCE):
            part = pairs[start : start + ENCODED_AT_ONCE]
            texts = {text for context, rest in part for text in (context.rstrip(), context + rest)}
            ordered = sorted(texts)
            self._encoded = dict(zip(ordered, self._encode(ordered), strict=True))
            found += [self._encode_one(*pair) for pair in part]
        self._encoded = {}
        return found

    def _encode_one(self, context: str, continuation: str) -> TokenPair:
        if context:
            context_ids, ids = self._encode_pair(context, continuation)
            return context_ids, ids
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids[:1] == [self.prefix_token_id]:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True
    ) -> list[Score]:
        for _, _, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model "
                    f"that reads {self.max_length}"
                )
        if "logits" not in self.engine.capabilities:
            return self._scores_without_logits(requests)
        # Requests with equal input (all tokens but the last) share a row.
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            asked[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(index)
        inputs = list(asked)
        rows = [
            Row(tokens, len(tokens) - max(len(requests[index][2]) for index in asked[tokens]))
            for tokens in inputs
        ]
        scores: dict[int, Score] = {}
        reader = RowReader(self.engine, self.batch_size, self.overhead)
        for place, logits in reader.logits(rows):
            members = asked[inputs[place]]
            found = _scores(logits, [requests[index][2] for index in members])
            scores.update(zip(members, found, strict=True))
        return [scores[index] for index in range(len(requests))]

    def _scores_without_logits(self, requests: Sequence[Request]) -> list[Score]:
        """Return the scores by an engine that gives log-probabilities of whole texts."""
        engine = self.engine
        assert isinstance(engine, Scoring)
        scores = []
        for _, context, continuation in requests:
            ids = torch.tensor([(context + continuation)[-self.max_length :]])
            likelihoods, likeliest = (
                found[0, -len(continuation) :] for found in engine.token_scores(ids)
            )
            scores.append((float(likelihoods.sum(dtype=torch.float64)), bool(likeliest.all())))
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of whole texts; windows predict each token once."""
        parts: list[Request] = []
        counts = []
        for tokens in self._encode([request.args[0] for request in requests]):
            windows = get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(window)) for window in windows]
            counts.append(len(found))
            parts += found
        scores = iter(self._loglikelihood_tokens(parts))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Write on greedily until a stop string, an end of text or the limit of tokens."""
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        for index, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], MAX_GEN_TOKS)
            if options.get("do_sample") or options.get("temperature"):
                raise ConfigError("a task asks for sampling; only greedy generation is compared")
            most = int(options["max_gen_toks"])
            if most >= self.max_length:
                raise ConfigError(
                    f"a task generates up to {most} tokens, but the model reads {self.max_length}"
                )
            until = tuple(handle_stop_sequences(options.get("until"), eos=eos))
            groups[most, until].append(index)
        for (most, until), members in groups.items():
            contexts = [requests[index].args[0] for index in members]
            prompts = [ids[-(self.max_length - most) :] for ids in self._encode_prompts(contexts)]
            for index, text in zip(members, self._write(prompts, most, until), strict=True):
                texts[index] = postprocess_generated_text(text, list(until), None)
        return texts

    def _encode_prompts(self, contexts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts; unlike elsewhere, only a BOS that exists counts as one."""
        if self.tokenizer.bos_token is not None:
            return self._encode(contexts)
        ids: list[list[int]] = self.tokenizer(list(contexts), verbose=False).input_ids
        return ids

    def _write(
        self, prompts: Sequence[Sequence[int]], most: int, until: Sequence[str]
    ) -> list[str]:
        """Return the texts behind `prompts`, which may go on behind a stop string."""
        if "logits" not in self.engine.capabilities:
            assert isinstance(self.engine, Writing)
            return self.engine.write(prompts, most, until)

        def ends(tokens: list[int]) -> bool:
            if tokens[-1] in self.stop_ids:
                return True
            text = self.tokenizer.decode(tokens)
            return any(stop in text for stop in until)

        order = sorted(
            range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index])
        )
        texts = [""] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            given = [prompts[index] for index in batch]
            written = write_greedily(self.engine, given, most, ends, self.overhead)
            for index, tokens in zip(batch, written, strict=True):
                kept = tokens[:-1] if tokens[-1] in self.stop_ids else tokens
                texts[index] = self.tokenizer.decode(kept, skip_special_tokens=True)
        return texts


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Let lm-eval compile each prompt template once instead of once a question.

    Its environment compiles at every call, which takes longer than reading the question.
    """
    environment = lm_eval.utils.env
    environment.from_string = cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


def _scores(logits: Tensor, continuations: Sequence[list[int]]) -> list[Score]:
    """Return the score of each continuation, which ends at the end of float32 `logits` [n, V]."""
    normalizer = logits.logsumexp(-1)
    likeliest = logits.argmax(-1)
    found = []
    for continuation in continuations:
        count = len(continuation)
        targets = torch.tensor(continuation, device=logits.device)
        terms = logits[-count:].gather(1, targets[:, None])[:, 0] - normalizer[-count:]
        greedy = bool((likeliest[-count:] == targets).all())
        found.append((float(terms.sum(dtype=torch.float64)), greedy))
    return found
