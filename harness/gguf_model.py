"""A ready-made GGUF file as a model: `model=gguf model.path=FILE method=checkpoint`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.folders import files_digest
from harness.models import SHAPE_OF_ARCHITECTURE, ModelSource, reference_identity, reference_model
from harness.record import digest
from kernels.errors import ConfigError
from methods.gguf_read import read_config

SHARED = tuple(key for key in SHAPE_OF_ARCHITECTURE if key != "model_type")
"""Of a file and its reference; a Mistral model is a Llama in GGUF."""


@dataclass(frozen=True)
class GgufModel:
    """One file in GGUF, whoever has written it.

    Attributes:
        name: as tables show it; `gguf` stands for the file's own name.
        path: the file; `~` is expanded, a relative path starts where the command was given.
        reference: folder or hub id of the unquantized model that it is compared with, whose
            tokenizer then counts; null: there is none.
    """

    name: str
    path: str
    reference: str | None = None

    trust_remote_code: ClassVar[bool] = False
    random_weights: ClassVar[bool] = False
    allow_pickle: ClassVar[bool] = False
    config: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.name == "gguf":
            object.__setattr__(self, "name", Path(self.path).expanduser().name)

    def folder(self) -> None:
        """There is no folder in Hugging Face layout: return None."""

    def tokenizer_folder(self) -> Path | None:
        """Return the original's folder, or None: the file carries a tokenizer of its own."""
        original = self.original()
        return None if original is None else original.tokenizer_folder()

    def checkpoint(self) -> Path:
        """Return the file as an absolute path.

        Raises:
            ConfigError: it is missing.
        """
        path = Path(self.path).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(
                f"model.path={self.path}: there is no file {path}; it must be a .gguf file"
            )
        return path

    def architecture(self) -> dict[str, Any]:
        """Return the configuration that the file's header states, as config.json has it."""
        return read_config(self.checkpoint())

    def architecture_identity(self) -> dict[str, Any]:
        """Return the digest of the configuration."""
        return {"kind": "architecture", "sha256": digest(self.architecture())}

    def identity(self, digests: Path) -> dict[str, Any]:
        """Return the file's digest; its path does not count."""
        sha = files_digest([self.checkpoint()], digests)
        reference = reference_identity(self.reference, self.architecture(), digests, SHARED)
        return {"kind": "gguf", "sha256": sha, **reference}

    def original(self) -> ModelSource | None:
        """Return the reference, or None."""
        return reference_model(self.reference)
