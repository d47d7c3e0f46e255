"""One HTTP request and its answer, piece by piece, where every fault is one sentence.

Standard library only (`http.client`): it follows no redirect and knows no proxy, so that the key
goes to the named host and nowhere else. Nothing is tried twice. Times are seconds of
`time.perf_counter`. The key stands in the header of a request and nowhere else: whatever a server
says goes through `Secret.scrub` before it is told, and no fault carries the library's own words.
"""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import quote, urlsplit

from kernels.errors import ConfigError

PIECE_BYTES = 1 << 16
MOST_BYTES = 1 << 28
"""Of one answer, or of one line of a stream: more is no answer to what is asked here."""

SAID_CHARACTERS = 200
SCRUBBED_CHARACTERS = 10_000
HIDDEN = "[key]"
PART_CHARACTERS = 8
"""So many characters of a key in a row are not told either."""

UNAUTHORIZED = (401, 403)
Json = Any


class ServerError(ConfigError):
    """A server that is not there, refuses, or answers nonsense; `status` is HTTP's, if it came."""

    def __init__(self, sentence: str, status: int | None = None) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect, of silence while an answer is read, and of a whole request."""

    connect: float
    read: float
    total: float

    def __post_init__(self) -> None:
        for name in ("connect", "read", "total"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"method.timeouts.{name} is {getattr(self, name)}; it must be above 0 seconds"
                )


class Secret:
    """An API key that no text can show; `variable` is the environment variable it came from."""

    def __init__(self, value: str | None, variable: str) -> None:
        self._value = value
        self.variable = variable

    def __repr__(self) -> str:
        return f"Secret from {self.variable}"

    def __bool__(self) -> bool:
        return self._value is not None

    def reveal(self) -> str | None:
        """Return the key itself."""
        return self._value

    def headers(self) -> dict[str, str]:
        """Return the header that carries the key, none where there is no key."""
        return {} if self._value is None else {"Authorization": f"Bearer {self._value}"}

    def scrub(self, text: str) -> str:
        """Return `text` without the key: encoded forms and long parts of it go too."""
        if self._value is None:
            return text
        key, size = self._value, min(PART_CHARACTERS, len(self._value))
        quoted = json.dumps(key)[1:-1]
        coded = b64encode(key.encode()).decode().rstrip("=")
        for form in (quote(key, safe=""), html.escape(key), quoted.replace("/", "\\/"), coded):
            text = text.replace(form, HIDDEN)
        hidden = [False] * len(text)
        for start in range(len(key) - size + 1):
            for found in re.finditer(re.escape(key[start : start + size]), text):
                hidden[found.start() : found.end()] = [True] * size
        pairs = groupby(zip(text, hidden, strict=True), key=lambda pair: pair[1])
        return "".join(HIDDEN if hide else "".join(c for c, _ in part) for hide, part in pairs)


def secret_from(variable: str) -> Secret:
    """Return the API key in environment variable `variable`; unset or empty is none.

    Raises:
        ConfigError: it holds what no header can carry; the sentence does not show it.
    """
    value = os.environ.get(variable, "").strip() or None
    if value is not None and re.fullmatch(r"[!-~]+", value) is None:
        raise ConfigError(
            f"the environment variable {variable} holds no API key: a key has printable ASCII "
            "characters without spaces"
        )
    return Secret(value, variable)


@dataclass(frozen=True)
class Address:
    """Where a server listens: `base` is the path before `/models` and `/completions`."""

    secure: bool
    host: str
    port: int
    base: str

    @property
    def url(self) -> str:
        """The address as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.base}"


def parse_address(url: str) -> Address:
    """Return the address that `url` names; `/v1` is added where the URL does not end with it.

    Raises:
        ConfigError: it is no http(s) URL, or carries what belongs elsewhere; it is not repeated,
            since it may hold a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or re.search(r"[^!-~]", url):
        raise ConfigError(
            "method.url is no address of a server; it must be like http://127.0.0.1:8000 or "
            "https://host/v1"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"method.url of {host} carries a user, a query or a fragment; give the bare address, "
            "and the API key in the environment variable that method.api_key_env names"
        )
    path = parts.path.rstrip("/")
    base = path if path.endswith("/v1") else f"{path}/v1"
    secure = parts.scheme == "https"
    return Address(secure, host, port or (443 if secure else 80), base)


@dataclass(frozen=True)
class Endpoint:
    """A server, the key to it, and how long to wait for it."""

    address: Address
    secret: Secret
    timeouts: Timeouts

    def at(self, path: str) -> str:
        """Return the server and `path` as the beginning of a sentence."""
        return f"the server at {self.secret.scrub(self.address.url)}{path}"

    def said(self, answer: Json) -> str:
        """Return the server's own words as the end of a sentence, short and without the key."""
        for key in ("error", "message", "detail"):
            if isinstance(answer, dict) and answer.get(key):
                answer = answer[key]
        text = answer if isinstance(answer, str) else json.dumps(answer) if answer else ""
        text = " ".join(self.secret.scrub(text[:SCRUBBED_CHARACTERS]).split())
        shown = text if len(text) <= SAID_CHARACTERS else f"{text[:SAID_CHARACTERS]}..."
        return f" ({shown})" if shown else ""


class Exchange:
    """One request on a connection of its own, and the answer to it."""

    def __init__(
        self, endpoint: Endpoint, method: str, path: str, body: Mapping[str, Json] | None
    ) -> None:
        self.endpoint = endpoint
        self.method = method
        self.path = path
        self.body = body
        self.where = endpoint.at(path)

    def __enter__(self) -> Exchange:
        """Connect, start the clock, send, and read the head of the answer.

        Raises:
            ServerError: no answer, or one that is no success.
        """
        address, timeouts = self.endpoint.address, self.endpoint.timeouts
        self.deadline = time.perf_counter() + timeouts.total
        wait = min(timeouts.connect, timeouts.total)
        self.connection: http.client.HTTPConnection
        if address.secure:
            self.connection = http.client.HTTPSConnection(address.host, address.port, timeout=wait)
        else:
            self.connection = http.client.HTTPConnection(address.host, address.port, timeout=wait)
        try:
            self._open(wait)
            status = self._send()
            if status != http.client.OK:
                raise self._refusal(status)
        except BaseException:
            self.connection.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the connection."""
        self.response.close()
        self.connection.close()

    def _open(self, wait: float) -> None:
        try:
            self.connection.connect()
        except TimeoutError:
            raise ServerError(
                f"{self.where} took no connection within {wait:g} seconds "
                "(method.timeouts.connect); check the address, or wait until it is up"
            ) from None
        except ssl.SSLError as error:
            raise ServerError(
                f"{self.where} cannot be reached over TLS ({error.reason or 'no TLS'}); check the "
                "scheme of method.url and the server's certificate"
            ) from None
        except OSError as error:
            raise ServerError(
                f"{self.where} cannot be reached ({error.strerror or error}); start it, or correct "
                "method.url"
            ) from None
        # http.client forgets it where the answer ends the connection.
        self.socket: socket.socket = self.connection.sock

    def _send(self) -> int:
        payload = None if self.body is None else json.dumps(self.body).encode()
        headers = {"Content-Type": "application/json", **self.endpoint.secret.headers()}
        with _Reading(self):
            self.started = time.perf_counter()
            self.connection.request(
                self.method, f"{self.endpoint.address.base}{self.path}", payload, headers
            )
            self.response = self.connection.getresponse()
        return self.response.status

    def _refusal(self, status: int) -> ServerError:
        """Return the error of an answer that is no success."""
        variable = self.endpoint.secret.variable
        if status in UNAUTHORIZED:
            # Servers repeat parts of a wrong key: none of their words.
            held = "a key" if self.endpoint.secret else "no key"
            return ServerError(
                f"{self.where} refuses the API key (HTTP {status}); the environment variable "
                f"{variable} holds {held}: put the right one there, or name another variable with "
                "method.api_key_env",
                status,
            )
        if 300 <= status < 400:
            return ServerError(
                f"{self.where} sends elsewhere (HTTP {status}), which is not followed; give the "
                "final address as method.url",
                status,
            )
        text = self.text()
        try:
            answer: Json = json.loads(text)
        except ValueError:
            answer = text
        advice = {
            404: "check method.url and method.model",
            429: "it takes fewer requests: ask with less concurrency, or raise its limit",
        }.get(status, "look into its log" if status >= 500 else "it does not take such a request")
        return ServerError(
            f"{self.where} answers with HTTP {status}{self.endpoint.said(answer)}; {advice}", status
        )

    def text(self) -> str:
        """Return the whole body of the answer."""
        pieces = [piece for _, piece in self._pieces()]
        return b"".join(pieces).decode(errors="replace")

    def parse(self, text: str) -> dict[str, Json]:
        """Return the JSON object in `text`."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ServerError(
                f"{self.where} answers with what is no JSON object{self.endpoint.said(text)}; is "
                "method.url that of an OpenAI-compatible server?"
            )
        return value

    def events(self) -> Iterator[tuple[float, str]]:
        """Yield (seconds from the request, data) of each event; comments are dropped."""
        kind = self.response.headers.get_content_type()
        if kind != "text/event-stream":
            raise ServerError(
                f"{self.where} answers a request for a stream with {kind}; this server cannot "
                "stream, and serving is measured from streams only"
            )
        rest, data = b"", []
        for at, piece in self._pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for raw in lines:
                line = raw.rstrip(b"\r").decode(errors="replace")
                if line.startswith("data:"):
                    data.append(line.removeprefix("data:").removeprefix(" "))
                elif not line and data:
                    yield at - self.started, "\n".join(data)
                    data = []
            if len(rest) > MOST_BYTES:
                raise self._too_much()
        if data:
            yield time.perf_counter() - self.started, "\n".join(data)

    def _pieces(self) -> Iterator[tuple[float, bytes]]:
        """Yield (time of arrival, bytes) as they come."""
        total = 0
        while True:
            with _Reading(self):
                piece = self.response.read1(PIECE_BYTES)
            if not piece:
                return
            total += len(piece)
            if total > MOST_BYTES:
                raise self._too_much()
            yield time.perf_counter(), piece

    def _too_much(self) -> ServerError:
        return ServerError(f"{self.where} sends more than {MOST_BYTES >> 20} MiB as one answer")


class _Reading:
    """Waiting for a server: sets the time that is left, and tells what ends it in a sentence.

    Errors are raised `from None`: those of the library may show what a server has sent.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def __enter__(self) -> None:
        """Set the time-out of the socket to what is left."""
        exchange = self.exchange
        left = exchange.deadline - time.perf_counter()
        if left <= 0:
            raise self._late()
        exchange.socket.settimeout(min(exchange.endpoint.timeouts.read, left))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Turn what went wrong on the way into a ServerError."""
        where = self.exchange.where
        if isinstance(error, TimeoutError):
            if time.perf_counter() >= self.exchange.deadline:
                raise self._late() from None
            silence = self.exchange.endpoint.timeouts.read
            raise ServerError(
                f"{where} said nothing for {silence:g} seconds (method.timeouts.read); it hangs, "
                "or is too slow for that limit"
            ) from None
        if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | OSError):
            raise ServerError(
                f"{where} broke off its answer; the server died or was stopped: look into its log"
            ) from None
        if isinstance(error, http.client.HTTPException | ValueError):
            raise ServerError(
                f"{where} does not speak HTTP as it should ({type(error).__name__}); is method.url "
                "that of an OpenAI-compatible server?"
            ) from None

    def _late(self) -> ServerError:
        total = self.exchange.endpoint.timeouts.total
        return ServerError(
            f"{self.exchange.where} did not finish within {total:g} seconds "
            "(method.timeouts.total); raise the limit, or ask for less"
        )
