"""An engine as a model of lm-eval (0.4.13), with the tokenization rules of its own HF model.

Source of the rules: `lm_eval.models.huggingface.HFLM`. Requests are sorted by length and batched;
requests that differ in their last token only (choices of one token after a shared question) are
one forward. This module imports lm_eval, so `harness.measures.tasks` imports it only to run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
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

from harness.measures.windows import FLOAT_BYTES, LOGITS_BYTES
from kernels.errors import ConfigError
from methods.base import Engine

Request = tuple[Any, list[int], list[int]]
"""What lm-eval calls the request, the context's tokens, the continuation's tokens."""

Score = tuple[float, bool]
"""Log-likelihood of the continuation in nats; whether greedy decoding would have written it."""


class EngineModel(TemplateLM):  # type: ignore[misc]  # lm_eval carries no types
    """Answers lm-eval's three kinds of request through `Engine.prefill` and `Engine.decode`."""

    backend = "causal"

    def __init__(
        self, engine: Engine, tokenizer: Any, batch_size: int, stop_ids: Iterable[int]
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.stop_ids = frozenset(stop_ids) | {self.eot_token_id}
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the tokens of `string`, special ones as the tokenizer adds them by itself.

        Contexts come back once for each of their continuations, so results are kept.
        """
        key = (string, add_special_tokens)
        if key not in self._encoded:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            if add_special_tokens is None and string.startswith(prefix):
                add_special_tokens = False
            if add_special_tokens is None:
                ids = self.tokenizer.encode(string)
            else:
                ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
            self._encoded[key] = ids
        return self._encoded[key]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Score]:
        """Score continuations; encoding is lm-eval's own."""
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of whole texts; windows predict each token once."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True
    ) -> list[Score]:
        # Requests with equal input (all tokens but the last) share a row of a forward.
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model "
                    f"that reads {self.max_length}"
                )
            rows[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(index)
        scores: dict[int, Score] = {}
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        for batch in self._batches(ordered):
            longest_scored = max(len(requests[i][2]) for row in batch for i in rows[row])
            first = min(map(len, batch)) - longest_scored
            logits, offset = self._read(batch, max(0, first))
            for row, row_logits in zip(batch, logits, strict=True):
                for index in rows[row]:
                    continuation = requests[index][2]
                    end = len(row) - offset
                    scored = row_logits[end - len(continuation) : end]
                    scores[index] = _score(scored, continuation)
        return [scores[index] for index in range(len(requests))]

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Yield consecutive rows, so many that their logits stay under LOGITS_BYTES."""
        start = 0
        while start < len(rows):
            row_bytes = len(rows[start]) * self.engine.vocab_size * FLOAT_BYTES
            size = max(1, min(self.batch_size, LOGITS_BYTES // row_bytes))
            yield rows[start : start + size]
            start += size

    def _read(self, rows: Sequence[tuple[int, ...]], first: int) -> tuple[Tensor, int]:
        """Return float32 logits [B, n, V] from position `first` on, and that position.

        Rows are padded on the right, which no earlier token of a causal model sees.
        """
        length = max(map(len, rows))
        padded = [[*row, *[0] * (length - len(row))] for row in rows]
        logits, _ = self.engine.prefill(torch.tensor(padded), last=length - first)
        return logits, first

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Write on greedily until a stop string, an end of text or the limit of tokens."""
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[tuple[int, list[int]]]] = defaultdict(list)
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        for index, request in enumerate(requests):
            context, options = request.args
            options = normalize_gen_kwargs(options)
            if options.get("do_sample") or options.get("temperature"):
                raise ConfigError("a task asks for sampling; only greedy generation is compared")
            most = int(options["max_gen_toks"])
            if most >= self.max_length:
                raise ConfigError(
                    f"a task generates up to {most} tokens, but the model reads {self.max_length}"
                )
            until = tuple(handle_stop_sequences(options.get("until"), eos=eos))
            prompt = self._encode_prompt(context)[-(self.max_length - most) :]
            groups[most, until].append((index, prompt))
        for (most, until), members in groups.items():
            members.sort(key=lambda member: (-len(member[1]), member[1]))
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                written = self._write([prompt for _, prompt in batch], most, until)
                for (index, _), tokens in zip(batch, written, strict=True):
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    texts[index] = postprocess_generated_text(text, list(until), None)
        return texts

    def _encode_prompt(self, context: str) -> list[int]:
        bos = self.tokenizer.bos_token
        ids: list[int]
        if bos is not None and context.startswith(bos):
            ids = self.tokenizer.encode(context, add_special_tokens=False)
        else:
            ids = self.tokenizer.encode(context)
        return ids

    def _write(
        self, prompts: Sequence[list[int]], most: int, until: Sequence[str]
    ) -> list[list[int]]:
        """Return the tokens written after each prompt, without the end of text.

        All rows advance together: a prompt longer than the shortest is fed token by token while
        the shorter ones already write, so a batch needs no padding.
        """
        position = min(map(len, prompts))
        start = torch.tensor([prompt[:position] for prompt in prompts])
        logits, cache = self.engine.prefill(start, last=1)
        written: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        while True:
            tokens = logits[:, -1].argmax(-1).tolist()
            for row, prompt in enumerate(prompts):
                if position < len(prompt):
                    tokens[row] = prompt[position]
                elif not done[row]:
                    done[row] = self._add(written[row], tokens[row], most, until)
            if all(done):
                return written
            logits, cache = self.engine.decode(torch.tensor(tokens)[:, None], cache)
            position += 1

    def _add(self, written: list[int], token: int, most: int, until: Sequence[str]) -> bool:
        """Append `token` to `written`; return whether the text ends here."""
        if token in self.stop_ids:
            return True
        written.append(token)
        text = self.tokenizer.decode(written)
        return len(written) == most or any(stop in text for stop in until)


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


def _score(logits: Tensor, continuation: list[int]) -> Score:
    """Return the score of `continuation` (n tokens) under float32 `logits` [n, V]."""
    targets = torch.tensor(continuation, device=logits.device)
    found = logits.log_softmax(-1).gather(1, targets[:, None])
    greedy = bool((logits.argmax(-1) == targets).all())
    return float(found.sum(dtype=torch.float64)), greedy
