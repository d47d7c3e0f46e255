"""A small OpenAI-compatible server on this machine: a known model, and every fault there is.

Its model is a table: the logits of the next token depend on the last one alone. Tokens are those of
`tests.architectures.tiny_tokenizer`.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from tests.architectures import BOS_ID, VOCABULARY, tiny_tokenizer

MODEL = "tiny"
TOKENIZER = tiny_tokenizer()
LETTERS = [TOKENIZER(letter, add_special_tokens=False).input_ids[0] for letter in "etaoins ,."]


def table() -> Tensor:
    """Return log-probabilities [V, V] of the next token; letters are likely ones."""
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(4))
    logits[:, LETTERS] += 4
    return logits.log_softmax(-1)


TABLE = table()


def expected(ids: list[int]) -> list[float]:
    """Return log p(token | the one before) of all `ids` but the first."""
    return [float(TABLE[a, b]) for a, b in pairwise(ids)]


def likeliest(before: int) -> int:
    """Return the likeliest token behind `before`."""
    return int(TABLE[before].argmax())


@dataclass
class Fake:
    """What the server is like.

    `fault` happens to completions for which `hits` is true; `requests` are all bodies it was sent.
    """

    key: str | None = None
    models: tuple[str, ...] = (MODEL,)
    owned_by: str = "vllm"
    takes_ids: bool = True
    takes_extras: bool = True
    adds_bos: bool = False
    echo: str = "right"  # none, shifted (as llama-cpp-python where no BOS leads), wrong
    prompt_logprobs: bool = False
    usage: bool = True
    max_model_len: int | None = None
    fault: str = ""
    hits: Callable[[dict[str, Any]], bool] = lambda body: True
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    stopped: Event = field(default_factory=Event)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.fake.headers.append(dict(self.headers))
        if not self._is_allowed():
            return
        if self.fake.fault == "models without list":
            self._json({"object": "list"})
            return
        entries = [{"id": name, "owned_by": self.fake.owned_by} for name in self.fake.models]
        if self.fake.max_model_len is not None:
            entries = [{**entry, "max_model_len": self.fake.max_model_len} for entry in entries]
        self._json({"object": "list", "data": entries})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.requests.append(body)
        self.fake.headers.append(dict(self.headers))
        if not self._is_allowed():
            return
        if self.fake.fault and self.fake.hits(body):
            FAULTS[self.fake.fault](self, body)
            return
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self._ids(prompt)
        if isinstance(prompt, list) and not self.fake.takes_ids:
            self._json({"error": {"message": "prompt must be a string"}}, 422)
        elif "min_tokens" in body and not self.fake.takes_extras:
            self._json({"error": {"message": "unknown field min_tokens"}}, 400)
        elif body.get("stream"):
            self._stream(body, ids)
        else:
            self._whole(body, ids)

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization")
        if self.fake.key is None or given == f"Bearer {self.fake.key}":
            return True
        self._json({"error": {"message": f"Incorrect API key provided: {given}"}}, 401)
        return False

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
        return [BOS_ID, *ids] if self.fake.adds_bos else ids

    def _whole(self, body: dict[str, Any], ids: list[int]) -> None:
        made = generated(ids, body["max_tokens"])
        choice: dict[str, Any] = {"text": TOKENIZER.decode(made), "finish_reason": "length"}
        if body.get("logprobs") is not None:
            choice["logprobs"] = self._logprobs(body, ids, made)
        if "prompt_logprobs" in body and self.fake.prompt_logprobs:
            rest = [
                {str(i): {"logprob": float(TABLE[before, i])} for i in (likeliest(before), token)}
                for before, token in pairwise(ids)
            ]
            choice["prompt_logprobs"] = [None, *rest]
        answer: dict[str, Any] = {"choices": [choice]}
        if self.fake.usage:
            answer["usage"] = {"prompt_tokens": len(ids), "completion_tokens": len(made)}
        self._json(answer)

    def _logprobs(
        self, body: dict[str, Any], ids: list[int], made: list[int]
    ) -> dict[str, Any] | None:
        shown, values = made, expected([ids[-1], *made])
        if body.get("echo"):
            if self.fake.echo == "none":
                return None
            shown, values = [*ids, *made], [float("nan"), *expected([*ids, *made])]
            if self.fake.echo == "wrong":
                values = [value - 1 for value in values]
            if self.fake.echo == "shifted" and ids[0] != BOS_ID:
                values = [float(TABLE[token, token]) for token in ids]
                shown = ids
            elif self.fake.echo == "shifted":
                shown, values = shown[1:], values[1:]
        behind = [*ids, *made][:-1] if body.get("echo") else [ids[-1], *made][: len(made)]
        tops: list[dict[str, float] | None] = [
            {TOKENIZER.decode([int(i)]): float(TABLE[before, i]) for i in TABLE[before].topk(5)[1]}
            for before in behind
        ]
        if body.get("echo"):
            tops = [None, *tops][len(tops) + 1 - len(values) :]
        listed: list[float | None] = list(values)
        if body.get("echo"):
            listed[0] = None
        return {
            "tokens": [TOKENIZER.decode([token]) for token in shown],
            "token_logprobs": listed,
            "top_logprobs": tops,
        }

    def _stream(self, body: dict[str, Any], ids: list[int]) -> None:
        self._begin_stream()
        made = generated(ids, body["max_tokens"])
        self._piece(b": ping\n\n")
        for number, token in enumerate(made):
            finish = "length" if number == len(made) - 1 else None
            self._event({"choices": [{"text": TOKENIZER.decode([token]), "finish_reason": finish}]})
        if self.fake.usage and body.get("stream_options"):
            usage = {"prompt_tokens": len(ids), "completion_tokens": len(made)}
            self._event({"choices": [], "usage": usage})
        self._piece(b"data: [DONE]\n\n")
        self._piece(b"")

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, event: Any) -> None:
        self._piece(f"data: {json.dumps(event)}\r\n\r\n".encode())

    def _piece(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def _json(self, answer: Any, status: int = 200) -> None:
        self._text(json.dumps(answer).encode(), status)

    def _text(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _cut(self) -> None:
        """End the connection without a word, as a killed process does."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def generated(ids: list[int], count: int) -> list[int]:
    """Return the greedy tokens behind `ids`."""
    made = [ids[-1]]
    for _ in range(count):
        made.append(int(TABLE[made[-1]].argmax()))
    return made[1:]


def _status(code: int) -> Callable[[_Handler, dict[str, Any]], None]:
    return lambda handler, body: handler._json({"error": {"message": "something about it"}}, code)


def _dies(handler: _Handler, body: dict[str, Any]) -> None:
    handler._begin_stream()
    handler._event({"choices": [{"text": "a", "finish_reason": None}]})
    handler._cut()


def _bad_event(handler: _Handler, body: dict[str, Any]) -> None:
    handler._begin_stream()
    handler._piece(b'data: {"choices": [{"te\n\n')
    handler._piece(b"")


def _error_event(handler: _Handler, body: dict[str, Any]) -> None:
    handler._begin_stream()
    handler._event({"choices": [{"text": "a", "finish_reason": None}]})
    handler._event({"error": {"message": "out of memory"}})
    handler._piece(b"")


def _slow(handler: _Handler, body: dict[str, Any]) -> None:
    handler._begin_stream()
    handler._event({"choices": [{"text": "a", "finish_reason": None}]})
    handler.fake.stopped.wait(30)


def _drips(handler: _Handler, body: dict[str, Any]) -> None:
    handler._begin_stream()
    while not handler.fake.stopped.wait(0.05):
        handler._event({"choices": [{"text": "a", "finish_reason": None}]})


def _tells_the_key(handler: _Handler, body: dict[str, Any]) -> None:
    key = handler.headers["Authorization"].removeprefix("Bearer ")
    message = f"{'x' * 150} {key} {key[:12]} {json.dumps(key)} {key[3:]}"
    handler._json({"error": {"message": message, "headers": dict(handler.headers)}}, 500)


def _redirects(handler: _Handler, body: dict[str, Any]) -> None:
    handler.send_response(307)
    handler.send_header("Location", "http://127.0.0.2:9/v1/completions")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _no_http(handler: _Handler, body: dict[str, Any]) -> None:
    key = handler.headers.get("Authorization", "")
    handler.wfile.write(f"SMTP {key}\r\n\r\n".encode())
    handler._cut()


FAULTS: dict[str, Callable[[_Handler, dict[str, Any]], None]] = {
    **{f"HTTP {code}": _status(code) for code in (401, 404, 422, 429, 500)},
    "dies": _dies,
    "ends early": lambda handler, body: handler._cut(),
    "bad event": _bad_event,
    "error event": _error_event,
    "bad JSON": lambda handler, body: handler._text(b'{"choices": ['),
    "no choices": lambda handler, body: handler._json({"choices": []}),
    "slow": _slow,
    "drips": _drips,
    "tells the key": _tells_the_key,
    "redirects": _redirects,
    "no HTTP": _no_http,
    "no stream": lambda handler, body: handler._json({"choices": [{"text": "a"}]}),
    "models without list": lambda handler, body: handler._json({"choices": [{"text": "a"}]}),
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


@contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    """Serve `fake` on a free port of the loopback; its `url` says where."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = _Server(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        fake.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def is_measured(body: dict[str, Any]) -> bool:
    """Whether a request is one of the measure's own, not one that tries what the server can do."""
    return bool(body.get("stream")) and body["max_tokens"] > 1


def texts_under(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield every file under `folder`."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def wait_until(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether `is_so` within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.02)
    return False
