"""GGUF behind llama-cpp-python's own server, which this process starts on the loopback and stops.

Quantizes as `gguf` does; what is measured is the server: `python -m llama_cpp.server` as a child,
with a free port of its own choice and an API key drawn for this start. It runs one request after
the other; the others wait, and their time to the first token says so. Keys and values are stored in
`hardware.compute_dtype`, as the engine in this process does.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig

from kernels.errors import ConfigError
from methods.base import Engine, Hardware
from methods.gguf import FILE, Gguf
from methods.library import require
from methods.llamacpp_engine import KV_TYPES
from methods.llamacpp_kernels import uses_of
from methods.options import require_flags
from methods.server import tokenizer_of
from methods.server_client import ServerClient
from methods.server_engine import RUNTIMES, Served, ServerEngine
from methods.server_http import Address, Endpoint, Secret, ServerError, Timeouts
from methods.server_process import ServerProcess

MODULE = "llama_cpp.server"
NEEDED = ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
OWNER = "gguf_server"
ALIAS = "model"
KEY_BYTES = 32
USUAL_CONTEXT = 2048
USUAL_TIMEOUTS = Timeouts(10, 600, 1800)
LOOPBACK = "127.0.0.1"
KEY_NAME = "the key of our own server"
"""Stands for an environment variable's name in sentences: nobody can set this key."""


@dataclass(frozen=True)
class GgufServer(Gguf):
    """A GGUF file served by llama-cpp-python.

    Attributes:
        logits_all: keep the logits of whole prompts (context x vocabulary x 4 bytes), so that
            prompts can be scored; the server's own default, and prompts are read slower with it.
        context_length: tokens the server has room for; None: the model's, at most 2048.
        start_seconds: longest to wait until the server is up.
        timeouts: how long to wait for answers.
    """

    timeouts: Timeouts = USUAL_TIMEOUTS
    logits_all: bool = True
    context_length: int | None = None
    start_seconds: float = 120.0

    loadings: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flags(OWNER, {"logits_all": self.logits_all})
        if self.context_length is not None and self.context_length < 2:
            raise ConfigError(
                f"method.context_length is {self.context_length}; it must be 2 or more, or null"
            )
        if self.start_seconds <= 0:
            raise ConfigError(f"method.start_seconds is {self.start_seconds}; it must be above 0")

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Start a server on the artefact's file and return an engine that asks it.

        Raises:
            ConfigError: llama-cpp-python or what its server needs is not installed.
            ServerError: the server did not come up; its last words are in the sentence.
        """
        require("gguf", OWNER)
        for package in ("llama_cpp", *NEEDED):
            require(package, OWNER, "llama-cpp-python[server]")
        self.check(hardware)
        path = (artefact / FILE).resolve()
        config = AutoConfig.from_pretrained(artefact, local_files_only=True)
        most = int(config.max_position_embeddings)
        wanted = self.context_length or min(most, USUAL_CONTEXT)
        if wanted > most:
            raise ConfigError(
                f"method.context_length is {wanted}, but the model reads at most {most} tokens"
            )
        secret = Secret(secrets.token_urlsafe(KEY_BYTES), KEY_NAME)
        process = ServerProcess(
            MODULE,
            "--config_file",
            json.dumps(self._settings(path, wanted, hardware, secret)),
            _environment(hardware),
        )
        try:
            client = self._up(process, secret)
            served = Served(ALIAS, RUNTIMES["me"], int(config.vocab_size), wanted)
            uses = uses_of(path, hardware)
            return ServerEngine(client, served, tokenizer_of(artefact), uses, process.stop)
        except BaseException:
            process.stop()
            raise

    def _settings(
        self, path: Path, context: int, hardware: Hardware, secret: Secret
    ) -> dict[str, Any]:
        """Return the content of the server's configuration file."""
        threads = hardware.usable_threads
        layers = -1 if hardware.gpu_layers is None else hardware.gpu_layers
        kv_type, _ = KV_TYPES[hardware.compute_dtype]
        model = {
            "model": str(path),
            "model_alias": ALIAS,
            "n_ctx": context + 1,  # a token is generated behind a scored prompt
            "n_threads": threads,
            "n_threads_batch": threads,
            "n_gpu_layers": layers if hardware.device == "cuda" else 0,
            "logits_all": self.logits_all,
            "flash_attn": hardware.compute_dtype != "float32",  # as the engine in this process
            "type_k": kv_type,
            "type_v": kv_type,
            "verbose": False,
        }
        return {
            "host": LOOPBACK,
            "port": 0,
            "api_key": secret.reveal(),
            "interrupt_requests": False,  # else each request ends the one before it
            "models": [model],
        }

    def _up(self, process: ServerProcess, secret: Secret) -> ServerClient:
        """Return a client of the server as soon as it answers."""
        found: list[ServerClient] = []

        def is_up() -> bool:
            port = process.port()
            if port is None:
                return False
            address = Address(False, LOOPBACK, port, "/v1")
            client = ServerClient(Endpoint(address, secret, self.timeouts))
            try:
                client.models()
            except ServerError:
                return False
            found.append(client)
            return True

        reason = process.wait_for(is_up, self.start_seconds)
        if reason is not None:
            raise ServerError(f"llama-cpp-python's server did not come up: {secret.scrub(reason)}")
        return found[0]


def _environment(hardware: Hardware) -> dict[str, str]:
    """Return this process's environment without what the server would take as its settings."""
    from llama_cpp.server.settings import Settings

    taken = {"config_file", *Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name.lower() not in taken}
    # A build for cards would use one for large products even with no layer on it.
    return kept if hardware.device == "cuda" else {**kept, "CUDA_VISIBLE_DEVICES": ""}
