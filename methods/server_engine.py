"""A model that an OpenAI-compatible server runs, behind the `Engine` protocol.

It answers requests (`Serving`) and, where the server gives log-probabilities of prompts, scores
given tokens (`methods.base.Scoring`). It shows no logits: those measures are not run. What the
server can do is tried when the engine is made; what was found stands in `notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.base import Cache, KernelUse
from methods.server_client import ServerClient
from methods.server_http import Json, ServerError
from methods.server_scoring import (
    PROBES,
    REFUSED,
    Prompts,
    Scored,
    Scorer,
    find_scorer,
    prompt_tokens,
)

RUNTIMES = {
    "llamacpp": "llama.cpp server",
    "me": "llama-cpp-python server",
    "sglang": "SGLang server",
    "vllm": "vLLM server",
}
"""What `owned_by` of a listed model says of the server."""

MOST_STOPS = 4
"""Stop strings that OpenAI's interface takes."""


@dataclass(frozen=True)
class Completion:
    """One answered request.

    Attributes:
        arrivals: seconds from the request to each piece of text, at least one.
        tokens: generated tokens.
        counted_by: who says how many: `usage`, `finish_reason` (as many as asked for) or `events`.
        prompt_tokens: as the server counts them, None where it does not say.
    """

    arrivals: tuple[float, ...]
    tokens: int
    counted_by: str
    prompt_tokens: int | None


@runtime_checkable
class Serving(Protocol):
    """An engine that answers requests from several threads at once."""

    notes: tuple[str, ...]

    def respond(self, prompt: Sequence[int], new_tokens: int) -> Completion:
        """Generate `new_tokens` tokens behind the tokens `prompt`, greedily, as a stream.

        Raises:
            ServerError: the request failed; it was made once.
        """
        ...


@dataclass(frozen=True)
class Served:
    """What is known of a served model: its name there, and the shape it was made from."""

    model: str
    runtime: str
    vocab_size: int
    context_length: int


class ServerEngine:
    """A served model; see the module's text."""

    def __init__(
        self,
        client: ServerClient,
        served: Served,
        tokenizer: Any,
        uses: Sequence[KernelUse] = (),
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._client = client
        self._served = served
        self._uses = list(uses)
        self._on_close = on_close
        self._prompts = _prompts(client, served, tokenizer)
        self._extras, said = _extras(client, served, self._prompts)
        self._scorer: Scorer | None = None
        scoring = "tokens cannot be scored: the model has no tokenizer"
        if tokenizer is not None:
            self._scorer, scoring = find_scorer(client, served.model, self._prompts)
        self.notes: tuple[str, ...] = (*said, scoring)

    @property
    def capabilities(self) -> frozenset[str]:
        """Requests, texts, and log-probabilities where the server gives those of prompts."""
        found = {"serve", "generate"}
        return frozenset(found | {"logprobs"} if self._scorer else found)

    @property
    def runtime(self) -> str:
        """The server's own name as far as it says it."""
        return self._served.runtime

    @property
    def vocab_size(self) -> int:
        """Width of the logits that the server keeps to itself."""
        return self._served.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens of a scored prompt."""
        return self._served.context_length

    def prefill(
        self, input_ids: Tensor, cache: Cache | None = None, last: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Refuse: a server shows no logits."""
        raise ConfigError(f"the {self.runtime} shows no logits")

    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Refuse: a server shows no logits."""
        raise ConfigError(f"the {self.runtime} shows no logits")

    def token_log_likelihoods(self, input_ids: Tensor) -> Tensor:
        """Return log p(token | those before it), nats, float32 [B, T - 1], of int64 [B, T].

        NaN stands where a server leaves a value out: behind BOS, on llama-cpp-python's.

        Raises:
            ServerError: the server cannot score these tokens, or failed.
        """
        return self._logprobs(self._scored(input_ids))

    def token_scores(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same, and whether each token is the likeliest there, bool [B, T - 1].

        Raises:
            ServerError: as above.
            ConfigError: the server does not say which token is the likeliest.
        """
        rows = self._scored(input_ids)
        # Behind BOS a server may say nothing at all, as it gives no value there.
        if any(one.likeliest is None and one.logprob == one.logprob for row in rows for one in row):
            raise ConfigError(f"the {self.runtime} does not say which token is the likeliest")
        likeliest = [[bool(one.likeliest) for one in row] for row in rows]
        return self._logprobs(rows), torch.tensor(likeliest)

    def _scored(self, input_ids: Tensor) -> list[list[Scored]]:
        if self._scorer is None:
            raise ConfigError(f"the {self.runtime} gives no log-probabilities of prompts")
        return [self._scorer.score(row) for row in input_ids.tolist()]

    @staticmethod
    def _logprobs(rows: list[list[Scored]]) -> Tensor:
        values = [[one.logprob for one in row] for row in rows]
        return torch.tensor(values, dtype=torch.float64).float()

    def write(self, prompts: Sequence[Sequence[int]], most: int, stops: Sequence[str]) -> list[str]:
        """Return the text behind the tokens of each prompt, greedily, at most `most` tokens.

        The server is told the first of `stops`; a text may go on behind the others.
        """
        return [self._text(prompt, most, stops) for prompt in prompts]

    def _text(self, prompt: Sequence[int], most: int, stops: Sequence[str]) -> str:
        body = _body(self._served, self._prompts, prompt, most)
        answer = self._client.complete({**body, "stop": list(stops[:MOST_STOPS])})
        text = answer["choices"][0].get("text")
        if not isinstance(text, str):
            raise ServerError(f"{self._client.endpoint.at('/completions')} answers without a text")
        return text

    def respond(self, prompt: Sequence[int], new_tokens: int) -> Completion:
        """Generate `new_tokens` tokens behind `prompt`; see `Serving`."""
        body = _body(self._served, self._prompts, prompt, new_tokens)
        extras = {**self._extras}
        if "min_tokens" in extras:
            extras["min_tokens"] = new_tokens
        streamed = self._client.stream({**body, **extras})
        if not streamed.arrivals:
            raise ServerError(
                f"{self._client.endpoint.at('/completions')} ended its answer without any text"
            )
        count = streamed.usage.get("completion_tokens")
        tokens, counted_by = len(streamed.arrivals), "events"
        if isinstance(count, int) and count > 0:
            tokens, counted_by = count, "usage"
        elif streamed.finish_reason == "length":
            tokens, counted_by = new_tokens, "finish_reason"
        read = prompt_tokens({"usage": dict(streamed.usage)})
        return Completion(streamed.arrivals, tokens, counted_by, read)

    def kernels(self) -> list[KernelUse]:
        """Return what runs each matrix, as far as it is known; nothing of a foreign server."""
        return list(self._uses)

    def close(self) -> None:
        """Stop the server where it is ours."""
        if self._on_close is not None:
            self._on_close()


def runtime_of(entry: Mapping[str, Json]) -> str:
    """Return a server's name from what it says of a model."""
    return RUNTIMES.get(str(entry.get("owned_by")), "server")


def leading_token(tokenizer: Any) -> int | None:
    """Return the id that `tokenizer` puts before a text by itself, or None."""
    if tokenizer is None:
        return None
    whole = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    return int(whole[0]) if whole[:1] != bare[:1] else None


def _body(
    served: Served, prompts: Prompts, prompt: Sequence[int], new_tokens: int
) -> dict[str, Json]:
    return {
        "model": served.model,
        "prompt": prompts.of(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
    }


def _prompts(client: ServerClient, served: Served, tokenizer: Any) -> Prompts:
    """Find out what the server takes as a prompt.

    Raises:
        ServerError: it takes neither ids nor text, or text where there is no tokenizer.
    """
    bos = leading_token(tokenizer)
    if tokenizer is None:
        ids = [token % served.vocab_size for token in range(1, 9)]
    else:
        ids = tokenizer(PROBES[0], add_special_tokens=False).input_ids
    as_ids = Prompts(tokenizer, True, False, bos)
    try:
        answer = client.complete(_body(served, as_ids, ids, 1))
    except ServerError as error:
        if error.status not in REFUSED:
            raise
    else:
        if prompt_tokens(answer) in (None, len(ids)):
            return as_ids
    if tokenizer is None:
        raise ServerError(
            f"{client.endpoint.at('/completions')} takes prompts as text only, and the model has "
            "no tokenizer; give one with model="
        )
    as_text = Prompts(tokenizer, False, False, bos)
    answer = client.complete(_body(served, as_text, ids, 1))
    return Prompts(tokenizer, False, prompt_tokens(answer) == len(ids) + 1, bos)


def _extras(
    client: ServerClient, served: Served, prompts: Prompts
) -> tuple[Mapping[str, Json], list[str]]:
    """Return the fields beyond OpenAI's that the server takes, and what to say of the others.

    With `ignore_eos` (vLLM, SGLang, llama.cpp) or `min_tokens` (vLLM, llama-cpp-python) answers
    have the wanted length; `stream_options` makes a server count the tokens itself.
    """
    counted = {"stream_options": {"include_usage": True}}
    tries: list[Mapping[str, Json]] = [
        {**counted, "ignore_eos": True, "min_tokens": 1},
        counted,
        {},
    ]
    ids = [1, 2, 3] if prompts.tokenizer is None else prompts.tokenizer(PROBES[0]).input_ids
    body = _body(served, prompts, ids, 1)
    said: list[str] = []
    for extras in tries[:-1]:
        try:
            client.stream({**body, **extras})
        except ServerError as error:
            if error.status not in REFUSED:
                raise
            refused = "ignore_eos and min_tokens" if "min_tokens" in extras else "stream_options"
            so = "answers may end early" if "min_tokens" in extras else "it counts no tokens"
            said.append(f"the server refuses {refused} (HTTP {error.status}): {so}")
        else:
            return extras, said
    client.stream(body)
    return tries[-1], said
