"""A small client of OpenAI-compatible servers: which models, whole answers, answers in pieces.

Source of the interface: OpenAI's API reference for `/v1/models` and `/v1/completions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.server_http import Endpoint, Exchange, Json, ServerError


@dataclass(frozen=True)
class Streamed:
    """An answer that came in pieces.

    Attributes:
        arrivals: seconds from the request to each piece of text.
        text: the pieces joined.
        finish_reason: why the server stopped, as it says.
        usage: its own count of tokens, empty where it gives none.
    """

    arrivals: tuple[float, ...]
    text: str
    finish_reason: str | None
    usage: Mapping[str, Json]


@dataclass(frozen=True)
class ServerClient:
    """Asks one server; a connection for each request, opened before its clock starts.

    Many threads may use one.
    """

    endpoint: Endpoint

    def models(self) -> list[dict[str, Json]]:
        """Return what the server says of each model it serves; `id` is the name.

        This is also how to find out whether it is up: not every server has a path for that.

        Raises:
            ServerError: it cannot be reached, refuses, or answers nonsense.
        """
        with Exchange(self.endpoint, "GET", "/models", None) as exchange:
            entries = exchange.parse(exchange.text()).get("data")
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
        ):
            raise ServerError(
                f"{self.endpoint.at('/models')} answers with no list of models (data: [id])"
            )
        return entries

    def complete(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """Return the answer to `body` in one piece; it has at least one choice.

        Raises:
            ServerError: as `models`.
        """
        with Exchange(self.endpoint, "POST", "/completions", body) as exchange:
            answer = exchange.parse(exchange.text())
        _choice(exchange, answer)
        return answer

    def stream(self, body: Mapping[str, Json]) -> Streamed:
        """Return the answer to `body` as it came.

        Raises:
            ServerError: as `models`, or the stream broke off before its end.
        """
        arrivals: list[float] = []
        texts: list[str] = []
        finish: str | None = None
        usage: Mapping[str, Json] = {}
        done = False
        asked = {**body, "stream": True}
        with Exchange(self.endpoint, "POST", "/completions", asked) as exchange:
            for at, data in exchange.events():
                done = data.strip() == "[DONE]"
                if done:
                    break
                event = exchange.parse(data)
                usage = _usage(event) or usage
                if "usage" in event and not event.get("choices"):
                    continue
                choice = _choice(exchange, event)
                finish = choice.get("finish_reason") or finish
                if choice.get("text"):
                    arrivals.append(at)
                    texts.append(str(choice["text"]))
        if not done and finish is None:
            raise ServerError(
                f"{exchange.where} broke off its stream after {len(arrivals)} pieces of text; the "
                "server died or was stopped: look into its log"
            )
        return Streamed(tuple(arrivals), "".join(texts), finish, usage)


def _usage(answer: Mapping[str, Json]) -> dict[str, Json]:
    usage = answer.get("usage")
    return usage if isinstance(usage, dict) else {}


def _choice(exchange: Exchange, answer: Mapping[str, Json]) -> dict[str, Json]:
    """Return the first choice of an answer or an event."""
    choices = answer.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    if answer.get("error"):
        said = exchange.endpoint.said(answer["error"])
        raise ServerError(f"{exchange.where} reports a failure{said}; look into its log")
    raise ServerError(f"{exchange.where} answers without any choice in it")
