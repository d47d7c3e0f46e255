"""How a server answers several clients at once: time to first token, time per token, throughput.

Closed loop: at each level so many clients send a request as soon as their last one has ended. Every
request has another prompt, cut from the evaluation text, so that a cache of prefixes is of no use.
Generation is greedy and asked for in full length. Times are a client's: from the moment the request
is sent, on a connection already open, to the arrival of a piece of text.

TPOT is the mean time between tokens after the first, of one request; the tokens are those that the
server counts, where it does. A request that fails counts as failed and is not made again.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from statistics import median
from threading import Barrier, Thread
from typing import Any, ClassVar

import torch

from harness.context import Context
from harness.measures.statistics import empirical_quantile
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.server_engine import Completion
from methods.server_engine import Serving as ServingEngine
from methods.server_http import ServerError

LEAST_REQUESTS = 8
TAIL = 0.99
HOPELESS = 3
"""So many failures, at least one a client, without any success end a level."""


@dataclass(frozen=True)
class Answer:
    """One request: when it was sent and ended (seconds of one clock), and how it went."""

    sent: float
    ended: float
    completion: Completion | None
    failure: str | None


@dataclass(frozen=True)
class Serving:
    """Requests to a server at several levels of concurrency.

    Attributes:
        concurrency: clients at once, one level each.
        prompt_length: tokens of a prompt.
        new_tokens: tokens asked for.
        requests: requests of a level, at least one a client; None is twice the clients, at least 8.
        warmup: requests before the first level, one after the other.
    """

    concurrency: Sequence[int] = (1, 4, 16, 64)
    prompt_length: int = 128
    new_tokens: int = 64
    requests: int | None = None
    warmup: int = 2

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"serve"})
    decisive: ClassVar[bool] = True
    """A server that answers none of its requests has no row beside others."""

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError(
                f"serving's concurrency is {list(self.concurrency)}; it needs numbers of 1 or more"
            )
        object.__setattr__(self, "concurrency", tuple(self.concurrency))
        least = (("prompt_length", 1), ("new_tokens", 2), ("requests", 1), ("warmup", 0))
        for name, smallest in least:
            given = getattr(self, name)
            if given is not None and given < smallest:
                raise ConfigError(f"serving's {name} is {given}; it must be {smallest} or more")

    def requests_at(self, clients: int) -> int:
        """Return the requests of a level."""
        if self.requests is None:
            return max(LEAST_REQUESTS, 2 * clients)
        return max(self.requests, clients)

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the figures of each level.

        Raises:
            ConfigError: prompt and answer do not fit into the model's context, the text is too
                short for that many prompts, or no request of a level was answered.
        """
        if not isinstance(engine, ServingEngine):
            raise ConfigError(f"the engine ({engine.runtime}) answers no requests")
        wanted = self.prompt_length + self.new_tokens
        if wanted > engine.context_length:
            raise ConfigError(
                f"serving asks for {self.prompt_length} + {self.new_tokens} tokens, but the model "
                f"has a context of {engine.context_length}; lower prompt_length or new_tokens"
            )
        counts = [self.requests_at(clients) for clients in self.concurrency]
        prompts = self._prompts(engine, context, self.warmup + sum(counts))
        details: dict[str, Any] = {
            "server": list(engine.notes),
            "prompts": "all different, cut from the evaluation text"
            if context.tokenizer is not None
            else "all different, drawn tokens",
            "warmup_requests": self.warmup,
            "levels": [],
        }
        context.details["serving"] = details
        for _ in range(self.warmup):
            engine.respond(prompts.pop(), self.new_tokens)
        values: list[Value] = []
        for clients, count in zip(self.concurrency, counts, strict=True):
            level = Level(self, engine, clients, [prompts.pop() for _ in range(count)])
            level.run()
            details["levels"].append(level.describe())
            values += level.values()
        return values

    def _prompts(self, engine: Engine, context: Context, count: int) -> list[list[int]]:
        """Return `count` different prompts of `prompt_length` tokens; BOS leads where it should.

        Raises:
            ConfigError: the text has not that many.
        """
        if context.tokenizer is None:
            generator = torch.Generator().manual_seed(context.seed)
            shape = (count, self.prompt_length)
            drawn: list[list[int]] = torch.randint(
                engine.vocab_size, shape, generator=generator
            ).tolist()
            return drawn
        tokens = context.texts.tokens("gptq")
        lead = [] if tokens.bos is None else [tokens.bos]
        ids = tokens.ids[len(lead) :].tolist()
        length = self.prompt_length - len(lead)
        last = len(ids) - length
        # Evenly over the text: apart from each other where it is long enough.
        starts = [round(index * last / max(1, count - 1)) for index in range(count)]
        if length < 1 or last < 0 or len(set(starts)) < count:
            raise ConfigError(
                f"text {tokens.text!r} has {len(ids)} tokens, too few for {count} different prompts"
                f" of {self.prompt_length} tokens; take a longer text, or fewer requests"
            )
        return [[*lead, *ids[start : start + length]] for start in starts]


class Level:
    """One level of concurrency: `clients` threads share the prompts."""

    def __init__(
        self, measure: Serving, engine: ServingEngine, clients: int, prompts: list[list[int]]
    ) -> None:
        self.measure = measure
        self.engine = engine
        self.clients = clients
        self.count = len(prompts)
        self.protocol = (
            f"prompt{measure.prompt_length}_new{measure.new_tokens}_concurrency{clients}"
        )
        self.waiting: SimpleQueue[list[int]] = SimpleQueue()
        for prompt in prompts:
            self.waiting.put(prompt)
        self.answers: list[Answer] = []
        self.broken: list[BaseException] = []
        self.cpu_seconds = 0.0
        self.load_before = os.getloadavg()[0]

    def run(self) -> None:
        """Send all requests.

        Raises:
            ServerError: none was answered; after some failures (HOPELESS) the rest is not sent.
        """
        barrier = Barrier(self.clients + 1)
        threads = [
            Thread(target=self._client, args=(barrier,), daemon=True) for _ in range(self.clients)
        ]
        for thread in threads:
            thread.start()
        cpu = time.process_time()
        barrier.wait()
        for thread in threads:
            thread.join()
        self.cpu_seconds = time.process_time() - cpu
        if self.broken:
            raise self.broken[0]
        if not self._answered():
            failures = self._failures()
            (sentence, _), *_ = failures.most_common(1)
            raise ServerError(
                f"none of {sum(failures.values())} requests at {self.protocol} was answered: "
                f"{sentence}"
            )

    def _client(self, barrier: Barrier) -> None:
        barrier.wait()
        try:
            while not self._is_hopeless():
                self.answers.append(self._ask(self.waiting.get_nowait()))
        except Empty:
            return
        except Exception as error:  # noqa: BLE001  # a thread's error is raised by the one that waits
            self.broken.append(error)

    def _is_hopeless(self) -> bool:
        answers = list(self.answers)
        return len(answers) >= max(self.clients, HOPELESS) and all(
            a.failure is not None for a in answers
        )

    def _ask(self, prompt: list[int]) -> Answer:
        sent = time.perf_counter()
        completion, failure = None, None
        try:
            completion = self.engine.respond(prompt, self.measure.new_tokens)
        except ServerError as error:
            failure = str(error)
        return Answer(sent, time.perf_counter(), completion, failure)

    def _answered(self) -> list[Completion]:
        return [answer.completion for answer in self.answers if answer.completion is not None]

    def _failures(self) -> Counter[str]:
        return Counter(answer.failure for answer in self.answers if answer.failure is not None)

    @property
    def _seconds(self) -> float:
        """Wall time from the first request to the last end."""
        return max(a.ended for a in self.answers) - min(a.sent for a in self.answers)

    def values(self) -> list[Value]:
        """Return the figures of the level."""
        answered = self._answered()
        first = [one.arrivals[0] for one in answered]
        per_token = [
            (one.arrivals[-1] - one.arrivals[0]) / (one.tokens - 1)
            for one in answered
            if one.tokens > 1 and len(one.arrivals) > 1
        ]
        tokens = sum(one.tokens for one in answered)
        failed = sum(self._failures().values())
        values = [
            self._value("ttft_seconds", median(first), "s", False, first),
            self._value("ttft_p99_seconds", empirical_quantile(first, TAIL), "s", False),
            self._value("serving_tokens_per_second", tokens / self._seconds, "tokens/s", True),
            self._value("requests_per_second", len(answered) / self._seconds, "requests/s", True),
            self._value("failed_requests", float(failed), "requests", False),
            self._value("failed_share", failed / len(self.answers), "ratio", False),
        ]
        if per_token:
            values.insert(2, self._value("tpot_seconds", median(per_token), "s", False, per_token))
        return values

    def _value(
        self, metric: str, value: float, unit: str, higher: bool, samples: Sequence[float] = ()
    ) -> Value:
        return Value("serving", metric, self.protocol, value, unit, higher, samples=tuple(samples))

    def describe(self) -> dict[str, Any]:
        """Return what is no figure: who counted, what failed, whether the client was in the way."""
        answered = self._answered()
        prompts = [one.prompt_tokens for one in answered if one.prompt_tokens is not None]
        return {
            "protocol": self.protocol,
            "requests": len(self.answers),
            "not_sent": self.count - len(self.answers),
            "failures": dict(self._failures()),
            "output_tokens": sum(one.tokens for one in answered),
            "fewest_output_tokens": min(one.tokens for one in answered),
            "tokens_counted_by": dict(Counter(one.counted_by for one in answered)),
            "prompt_tokens_of_server": [min(prompts), max(prompts)] if prompts else None,
            "seconds": self._seconds,
            # Of this process, one core's worth at most: near 1 it is the client that is measured.
            "client_cpu_share": self.cpu_seconds / self._seconds,
            "load_average": [self.load_before, os.getloadavg()[0]],
        }
