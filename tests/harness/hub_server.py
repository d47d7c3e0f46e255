"""A small stand-in for the Hugging Face hub on this machine, and a process that talks to it.

It speaks the part of the hub's protocol that huggingface_hub uses to resolve a revision, list files
and fetch them. huggingface_hub reads HF_ENDPOINT when it is imported, hence the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens


@dataclass
class Hub:
    """What the hub holds: files by `models/<id>` or `datasets/<id>`; gated repositories refuse."""

    files: dict[str, dict[str, bytes]]
    gated: frozenset[str] = frozenset()
    requests: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.hub.requests.append(path)
        for name, files in self.hub.files.items():
            plural, _, repository = name.partition("/")
            api = f"api/{plural}/{repository}"
            resolve = f"{repository if plural == 'models' else name}/resolve/"
            if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": file} for file in files]
                return self._json({"id": repository, "sha": COMMIT, "siblings": names})
            if path.startswith(f"{api}/revision/"):
                return self._error(404, "RevisionNotFound")
            if name in self.hub.gated and path.startswith((api, resolve)):
                return self._error(403, "GatedRepo")
            if path.startswith(f"{api}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(body), "oid": _oid(body)}
                    for file, body in files.items()
                ]
                return self._json(tree)
            if path.startswith(resolve):
                return self._send(files[path.removeprefix(resolve).partition("/")[2]])
        return self._error(401, "RepoNotFound")

    def _json(self, content: Any) -> None:
        self._send(json.dumps(content).encode())

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_oid(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve `hub` while the block runs; yields the endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(expression: str, home: Path, endpoint: str, offline: bool = False) -> str:
    """Evaluate `expression` over harness.models (M) and harness.data (D) in a process of its own.

    Returns the printed value, or `error: ` and the sentence of a ConfigError.
    """
    code = (
        "import harness.models as M, harness.data as D\n"
        "from kernels.errors import ConfigError\n"
        "from pathlib import Path\n"
        f"try: print({expression})\n"
        "except ConfigError as error: print(f'error: {error}')\n"
    )
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    settings = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
