"""Log-probabilities of given tokens from a server, trusted only after a check.

Two ways are known: vLLM's `prompt_logprobs`, by token id, and OpenAI's `echo` with `logprobs`, by
position. Servers differ in what they put at a position (llama-cpp-python's shifts the whole list
by one where no BOS leads the prompt), so each way is held against what the same server says of a
token it generates itself. Values are nats, as the server gives them; NaN where it gives none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from methods.server_client import ServerClient
from methods.server_http import Json, ServerError

AGREEMENT = 0.1
"""Between a token read in a prompt and the same token generated: float16 kernels differ by 0.05 at
most, a value of another position by whole nats."""

TOP = 5
"""Alternatives asked for, the most that OpenAI's interface gives."""

PROBES = (
    "One, two, three, four, five and six.",
    "The house stands near the old river.",
    "It was late when they came home again.",
)


REFUSED = (400, 415, 422, 500, 501)
"""What servers answer to a field they do not take; 500 is llama-cpp-python's."""


class NotScoredError(ServerError):
    """The server gives no log-probability of these tokens."""


@dataclass(frozen=True)
class Prompts:
    """Turns tokens into what the server takes as a prompt.

    Attributes:
        tokenizer: the model's; None where only ids are sent.
        takes_ids: ids are sent as they are; else as text.
        adds_bos: the server puts BOS before a text by itself.
        bos: the id that leads a text of this model, None where none does.
    """

    tokenizer: Any
    takes_ids: bool
    adds_bos: bool
    bos: int | None

    def of(self, ids: Sequence[int]) -> list[int] | str:
        """Return the prompt for `ids`."""
        if self.takes_ids:
            return list(ids)
        return self.text(ids[1:] if self.adds_bos and ids[:1] == [self.bos] else ids)

    def text(self, ids: Sequence[int]) -> str:
        """Return `ids` as text, special tokens included."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


@dataclass(frozen=True)
class Scored:
    """What a server says of a token: nats, and whether it is the likeliest (None: not said)."""

    logprob: float
    likeliest: bool | None


Way = Callable[[ServerClient, str, Prompts, Sequence[int]], list[Scored]]


def by_prompt_logprobs(
    client: ServerClient, model: str, prompts: Prompts, ids: Sequence[int]
) -> list[Scored]:
    """Return what is said of all but the first of `ids`, by vLLM's `prompt_logprobs`."""
    answer = _ask(client, model, prompts, ids, {"prompt_logprobs": 1})
    entries = answer["choices"][0].get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise NotScoredError(f"{_where(client)} gives no prompt_logprobs")
    pairs = list(zip(entries, ids, strict=True))[1:]
    return [_of_entry(client, entry, token) for entry, token in pairs]


def _of_entry(client: ServerClient, entry: Json, token: int) -> Scored:
    """Return what vLLM's entry says: the token itself and the likeliest, by token id."""
    found = entry.get(str(token)) if isinstance(entry, dict) else None
    logprob = _number(client, found.get("logprob") if isinstance(found, dict) else None)
    others = [other.get("logprob") for other in entry.values() if isinstance(other, dict)]
    return Scored(logprob, all(logprob >= _number(client, other) for other in others))


def by_echo(client: ServerClient, model: str, prompts: Prompts, ids: Sequence[int]) -> list[Scored]:
    """Return what is said of all but the first of `ids`, by OpenAI's `echo` with `logprobs`.

    A server may leave BOS out of the list; then what follows it has no value: NaN.

    Raises:
        NotScoredError: there are none, or those of other tokens.
    """
    answer = _ask(client, model, prompts, ids, {"echo": True, "logprobs": 1})
    found = answer["choices"][0].get("logprobs")
    values = found.get("token_logprobs") if isinstance(found, dict) else None
    tokens = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(values, list) or not isinstance(tokens, list):
        raise NotScoredError(f"{_where(client)} gives no logprobs of the prompt")
    if prompts.takes_ids:
        at = list(range(len(ids)))
    else:
        at = _positions(client, prompts, ids, [str(token) for token in tokens])
    if len(values) <= at[-1]:
        raise NotScoredError(f"{_where(client)} gives logprobs of a part of the prompt only")
    tops = found.get("top_logprobs") if isinstance(found, dict) else None
    tops = tops if isinstance(tops, list) and len(tops) == len(values) else [None] * len(values)
    return [
        Scored(math.nan, None) if i < 1 else _of_position(client, values[i], tops[i])
        for i in at[1:]
    ]


def _of_position(client: ServerClient, value: Json, top: Json) -> Scored:
    """Return what OpenAI's lists say of one token; `top` holds at least the likeliest."""
    logprob = _number(client, value)
    if not isinstance(top, dict) or not top:
        return Scored(logprob, None)
    return Scored(logprob, all(logprob >= _number(client, other) for other in top.values()))


def _positions(
    client: ServerClient, prompts: Prompts, ids: Sequence[int], tokens: Sequence[str]
) -> list[int]:
    """Return where in the server's `tokens` each of `ids` stands, -1 for a BOS left out.

    Raises:
        NotScoredError: it has read the text as other tokens.
    """
    for shown in (list(ids), [token for token in ids if token != prompts.bos]):
        if [_plain(prompts.text([token])) for token in shown] != [
            _plain(token) for token in tokens[: len(shown)]
        ]:
            continue
        if len(shown) == len(ids):
            return list(range(len(ids)))
        before, at = 0, []
        for token in ids:
            at.append(-1 if token == prompts.bos else before)
            before += token != prompts.bos
        return at
    raise NotScoredError(
        f"{_where(client)} takes prompts as text only, and reads this one as other tokens than the "
        "tokenizer of model= made of it, so it cannot be scored on the same tokens"
    )


def _plain(piece: str) -> str:
    """Return a token's text without what tokenizers and servers show in different ways.

    That is the leading space of a first word, and the bytes of a character cut in two.
    """
    return piece.replace("\ufffd", "").removeprefix(" ")


def _ask(
    client: ServerClient,
    model: str,
    prompts: Prompts,
    ids: Sequence[int],
    more: Mapping[str, Json],
) -> dict[str, Json]:
    """Return the answer to `ids` as a prompt, read as exactly these tokens."""
    # One token is generated, though none is wanted: not every server takes max_tokens=0.
    body = {"model": model, "prompt": prompts.of(ids), "max_tokens": 1, "temperature": 0}
    answer = client.complete({**body, **more})
    read = prompt_tokens(answer)
    if read is None and not prompts.takes_ids:
        raise NotScoredError(
            f"{_where(client)} takes prompts as text only and does not say how many tokens it read"
        )
    if read is not None and read != len(ids):
        raise NotScoredError(
            f"{_where(client)} reads this prompt of {len(ids)} tokens as {read}, so it cannot be "
            "scored on the same tokens"
        )
    return answer


def prompt_tokens(answer: Mapping[str, Json]) -> int | None:
    """Return the server's own count of the prompt's tokens, None where it gives none."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _number(client: ServerClient, value: Json) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise NotScoredError(f"{_where(client)} gives no logprob of some tokens of the prompt")


def _where(client: ServerClient) -> str:
    return client.endpoint.at("/completions")


@dataclass(frozen=True)
class Scorer:
    """Scores prompts in a way that was found to be right.

    Attributes:
        led, bare: whether it is right for prompts with and without a leading BOS.
    """

    client: ServerClient
    model: str
    prompts: Prompts
    way: Way
    led: bool
    bare: bool

    def score(self, ids: Sequence[int]) -> list[Scored]:
        """Return what the server says of all `ids` but the first.

        Raises:
            ServerError: the server cannot score them, or not rightly.
        """
        first_is_bos = self.prompts.bos is not None and ids[0] == self.prompts.bos
        if not (self.led if first_is_bos else self.bare):
            raise NotScoredError(
                f"{_where(self.client)} gives right logprobs only of prompts "
                f"{'that begin' if self.led else 'that do not begin'} with BOS, and this one does "
                f"{'' if first_is_bos else 'not'}; take the llamacpp protocol, whose windows do, "
                "or an engine in this process"
            )
        return self.way(self.client, self.model, self.prompts, ids)


def find_scorer(client: ServerClient, model: str, prompts: Prompts) -> tuple[Scorer | None, str]:
    """Return what scores prompts on this server, None where nothing does, and a note on it.

    Raises:
        ServerError: the server failed in another way than by not taking a request.
    """
    ways: dict[str, Way] = {"prompt_logprobs": by_prompt_logprobs, "echo with logprobs": by_echo}
    if not prompts.takes_ids:
        del ways["prompt_logprobs"]
    reasons: list[str] = []
    for name, way in ways.items():
        right = {"that begin with BOS": False, "that do not begin with BOS": False}
        for which, led in zip(right, (True, False), strict=True):
            if prompts.bos is None if led else prompts.adds_bos:
                continue
            try:
                _check(client, model, prompts, way, led)
                right[which] = True
            except ServerError as error:
                if error.status not in REFUSED and not isinstance(error, NotScoredError):
                    raise
                reasons.append(str(error))
        if any(right.values()):
            sent = "token ids" if prompts.takes_ids else "text that reads as the same tokens"
            only = [which for which, one in right.items() if one]
            limit = (
                f", only of prompts {only[0]}" if len(only) == 1 and prompts.bos is not None else ""
            )
            note = f"tokens are scored by the server's {name}, from prompts as {sent}{limit}"
            return Scorer(client, model, prompts, way, *right.values()), note
    return None, f"tokens cannot be scored: {'; '.join(dict.fromkeys(reasons))}"


def _check(client: ServerClient, model: str, prompts: Prompts, way: Way, led: bool) -> None:
    """Hold what `way` says of a token in a prompt against what generating that token said.

    Raises:
        NotScoredError: they differ for one of the probes, or cannot be compared.
    """
    checked = False
    for probe in PROBES:
        ids = prompts.tokenizer(probe, add_special_tokens=False).input_ids
        ids = [prompts.bos, *ids] if led else ids
        way(client, model, prompts, ids)
        for token, logprob in _alternatives(client, model, prompts, ids):
            try:
                found = way(client, model, prompts, [*ids, token])[-1].logprob
            except NotScoredError:
                continue  # as text this token may become another: the next alternative
            checked = True
            if not abs(found - logprob) < AGREEMENT:
                raise NotScoredError(
                    f"{_where(client)} gives logprobs of a prompt {'with' if led else 'without'} "
                    f"BOS that are not those of its tokens ({found:.2f} where generating the token "
                    f"gives {logprob:.2f})"
                )
            break
    if not checked:
        raise NotScoredError(
            f"{_where(client)} gives no logprobs of generated tokens to check those of prompts with"
        )


def _alternatives(
    client: ServerClient, model: str, prompts: Prompts, ids: Sequence[int]
) -> list[tuple[int, float]]:
    """Return (token, log-probability) of the likeliest next tokens, as the server generates."""
    answer = _ask(client, model, prompts, ids, {"logprobs": TOP})
    found = answer["choices"][0].get("logprobs")
    tops = found.get("top_logprobs") if isinstance(found, dict) else None
    top = tops[0] if isinstance(tops, list) and tops else None
    pairs = top.items() if isinstance(top, dict) else ()
    known: list[tuple[int, float]] = []
    for piece, logprob in pairs:
        token = _token_of(prompts, piece)
        if token is not None:
            known.append((token, _number(client, logprob)))
    return sorted(known, key=lambda pair: -pair[1])


def _token_of(prompts: Prompts, piece: str) -> int | None:
    """Return the token whose text is `piece`, None where that is not sure."""
    if not piece or "\ufffd" in piece:
        return None
    tokenizer = prompts.tokenizer
    ids: list[int] = tokenizer(piece, add_special_tokens=False).input_ids
    # SentencePiece writes the space of a word's beginning as a letter of its own.
    marked = tokenizer.convert_tokens_to_ids(piece.replace(" ", "\u2581"))
    token = ids[0] if len(ids) == 1 else marked
    if token is None or token == tokenizer.unk_token_id:
        return None
    return int(token) if _plain(prompts.text([int(token)])) == _plain(piece) else None
