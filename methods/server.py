"""A model that somebody else serves: any OpenAI-compatible endpoint, measured as it is.

vLLM, SGLang, TGI, llama.cpp's server and others. The harness's model gives the tokenizer and the
shape only; what the server runs is the server's business, and every row says so. The API key is
read from an environment variable when a request is made and is stored nowhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoTokenizer

from kernels.errors import ConfigError
from methods.base import Engine, Hardware, Matrix, QuantizeReport
from methods.options import require_flags
from methods.server_client import ServerClient
from methods.server_engine import Served, ServerEngine, runtime_of
from methods.server_http import (
    Endpoint,
    Json,
    ServerError,
    Timeouts,
    parse_address,
    secret_from,
)

FILE = "endpoint.json"
FORMAT = 1
NAMES_SHOWN = 8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Server:
    """A served model.

    Attributes:
        url: address of the server, with or without `/v1`.
        model: name as the server lists it; None: the only one it lists.
        api_key_env: name of the environment variable that holds the API key; unset: no key.
        timeouts: how long to wait.
        compare: whether the harness's model, weights included, is what the server's is compared
            with: as the baseline, and in what needs the unquantized model.
    """

    name: str
    url: str
    timeouts: Timeouts
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    compare: bool = False

    needs_calibration: ClassVar[bool] = False
    takes_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        parse_address(self.url)
        require_flags("server", {"compare": self.compare})
        # Not repeated in the sentence: it may be the key itself.
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) is None:
            raise ConfigError(
                "method.api_key_env is no name of an environment variable; it must be the name of "
                "the variable that holds the key, like OPENAI_API_KEY, never the key itself"
            )

    @property
    def bits(self) -> float | None:
        """Unknown: the server's business."""
        return None

    @property
    def group_size(self) -> int | None:
        """Unknown: the server's business."""
        return None

    def check(self, hardware: Hardware) -> None:
        """Refuse a key that stands in the configuration, which every record repeats.

        Nothing else: the server has hardware of its own.
        """
        if self.api_key_env in getattr(hardware, "environment", {}):
            raise ConfigError(
                f"hardware.environment sets {self.api_key_env}, the API key of method=server, and "
                "every record would show it; set it in the shell that starts the run"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """Refuse: nothing of the model is here."""
        raise ConfigError("what a server stores of a model cannot be told; choose another method")

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return no matrix; all parameters are elsewhere."""
        weights = sum(parameter.numel() for parameter in model.parameters())
        return [], [("model", weights, "on the server")]

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Refuse: see `adopt`."""
        raise ConfigError("method=server quantizes nothing; it asks a running server")

    def adopt(self, checkpoint: Path, model: nn.Module, into: Path) -> QuantizeReport:
        """Write where the server is and which of its models is meant; never the key.

        Raises:
            ServerError: it cannot be reached, refuses, or does not list the model.
        """
        entry = self._listed(self.model)
        config: Any = model.config
        facts = {
            "format": FORMAT,
            "url": self._endpoint.address.url,
            "model": entry["id"],
            "vocab_size": int(config.vocab_size),
            "context_length": int(config.max_position_embeddings),
        }
        (into / FILE).write_text(json.dumps(facts, indent=1))
        note = (
            f"run by the server at {facts['url']} as {facts['model']}: what it has stored, how and "
            "on which hardware it runs is the server's business; the model named here gave its "
            "tokenizer only"
        )
        return QuantizeReport([], 0, self.select(model)[1], [note])

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Return an engine that asks the server.

        Raises:
            ServerError: it cannot be reached, refuses, or lists the model no more.
        """
        facts = json.loads((artefact / FILE).read_text())
        entry = self._listed(facts["model"])
        served = Served(
            facts["model"],
            runtime_of(entry),
            facts["vocab_size"],
            _context_length(entry, facts["context_length"]),
        )
        return ServerEngine(ServerClient(self._endpoint), served, tokenizer_of(artefact))

    @property
    def _endpoint(self) -> Endpoint:
        return Endpoint(parse_address(self.url), secret_from(self.api_key_env), self.timeouts)

    def _listed(self, wanted: str | None) -> dict[str, Json]:
        """Return the entry of the model `wanted`, or the only one, in the server's list."""
        endpoint = self._endpoint
        entries = ServerClient(endpoint).models()
        found = [entry for entry in entries if wanted in (None, entry["id"])]
        if len(found) == 1:
            return {**found[0], "id": endpoint.secret.scrub(found[0]["id"])}
        names = [endpoint.secret.scrub(entry["id"]) for entry in entries]
        shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        where = endpoint.at("/models")
        if not entries:
            raise ServerError(f"{where} lists no model; load one there")
        if wanted is None:
            raise ServerError(
                f"{where} lists {len(names)} models; choose one with method.model: {shown}"
            )
        raise ServerError(f"{where} does not list the model {wanted}; it lists {shown}")


def _context_length(entry: dict[str, Json], of_model: int) -> int:
    """Return the most tokens of a scored prompt: a token is generated behind it."""
    stated = entry.get("max_model_len")
    return min(of_model, stated - 1) if isinstance(stated, int) and stated > 1 else of_model


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer in `folder`, or None where there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
