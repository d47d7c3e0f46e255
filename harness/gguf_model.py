"""A ready-made GGUF file as a model, here or on the hub, for `method=checkpoint`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.folders import files_digest
from harness.hub import Repository
from harness.models import SHAPE_OF_ARCHITECTURE, ModelSource, reference_identity, reference_model
from harness.record import digest
from kernels.errors import ConfigError
from methods.gguf_read import read_config

SHARED = tuple(key for key in SHAPE_OF_ARCHITECTURE if key != "model_type")
"""Of a file and its reference; a Mistral model is a Llama in GGUF."""


@dataclass(frozen=True)
class GgufModel:
    """One file in GGUF, whoever has written it: a `path`, or an `id` of the hub and a `file` there.

    Attributes:
        name: as tables show it; `gguf` stands for the file's own name.
        path: the file; `~` is expanded, a relative path starts where the command was given.
        id: `owner/name` of a model of the hub.
        file: the file's name there.
        revision: branch, tag or commit; the commit it stands for is in every record.
        reference: folder or hub id of the unquantized model that it is compared with, whose
            tokenizer then counts; null: there is none.
    """

    name: str
    path: str | None = None
    id: str | None = None
    file: str | None = None
    revision: str = "main"
    reference: str | None = None

    trust_remote_code: ClassVar[bool] = False
    random_weights: ClassVar[bool] = False
    allow_pickle: ClassVar[bool] = False
    config: ClassVar[None] = None

    def __post_init__(self) -> None:
        on_hub = self.id is not None and self.file is not None
        if (self.path is None) != on_hub or (self.path is not None and (self.id or self.file)):
            raise ConfigError(
                "model=gguf needs one file: model.path=FILE.gguf, or one of the hub with "
                "model.id=OWNER/NAME model.file=FILE.gguf"
            )
        if self.name == "gguf":
            object.__setattr__(self, "name", Path(self.path or self.file or "").expanduser().name)

    @property
    def _repository(self) -> Repository | None:
        instead = "a file with model.path=FILE.gguf"
        return Repository("model", self.id, self.revision, instead) if self.id else None

    def folder(self) -> None:
        """There is no folder in Hugging Face layout: return None."""

    def tokenizer_folder(self) -> Path | None:
        """Return the original's folder, or None: the file carries a tokenizer of its own."""
        original = self.original()
        return None if original is None else original.tokenizer_folder()

    def checkpoint(self) -> Path:
        """Return the file as an absolute path, fetched from the hub where it is not here.

        Raises:
            ConfigError: it is missing.
        """
        repository, file = self._repository, self.file
        if repository is not None and file is not None:
            folder = repository.folder([file], lambda found: _lacks(found, file))
            return folder / file
        path = Path(self.path or "").expanduser().resolve()
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
        """Return the file's digest, or its commit on the hub; a path does not count."""
        reference = {}
        if self.reference is not None:
            shape = self.architecture()
            reference = reference_identity(self.reference, shape, digests, SHARED)
        repository = self._repository
        if repository is not None:
            commit = repository.commit()
            return {"kind": "hub", "id": self.id, "file": self.file, "commit": commit, **reference}
        return {"kind": "gguf", "sha256": files_digest([self.checkpoint()], digests), **reference}

    def original(self) -> ModelSource | None:
        """Return the reference, or None."""
        return reference_model(self.reference)


def _lacks(folder: Path, file: str) -> str | None:
    return None if (folder / file).is_file() else f"has no file {file}"
