"""Where a model comes from: the project itself, a folder, or the hub.

The classes are what `conf/model/*.yaml` instantiate, beside those of `harness.shape_model` and
`harness.gguf_model`. Torch-free: the driver asks them for names and identities; `harness.load`
makes a model of what they point to. Code that comes with a model is never run: an architecture
that transformers does not know is refused.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from harness.folders import (
    CONFIG,
    FILES,
    PICKLE_PATTERNS,
    POOLING,
    SAFETENSORS_PATTERNS,
    TOKENIZER_MODELS,
    WEIGHTS,
    checked_config,
    folder_digest,
    no_weights,
    read_config,
    weight_files,
)
from harness.hub import Repository
from harness.record import digest
from kernels.errors import ConfigError

SHAPE_OF_ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers"),
    *("intermediate_size", "n_embd", "n_layer"),
)
"""What a checkpoint and the model it was made from must share, as far as config.json says it."""
LOCAL_INSTEAD = "a folder with model=local model.path=FOLDER"


class ModelSource(Protocol):
    """What every choice of `model` answers.

    Attributes:
        trust_remote_code: always false: code that comes with a model is not run.
    """

    trust_remote_code: ClassVar[bool]

    @property
    def name(self) -> str:
        """Name as tables show it."""
        ...

    @property
    def random_weights(self) -> bool:
        """Whether the weights are drawn, so that quality means nothing."""
        ...

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The architecture kept in the project, as in config.json; None: it is in the folder."""
        ...

    @property
    def allow_pickle(self) -> bool:
        """Whether weights may be read from a pickle."""
        ...

    def folder(self) -> Path | None:
        """Return the folder in Hugging Face layout, fetched if need be; None for a bare shape."""
        ...

    def tokenizer_folder(self) -> Path | None:
        """Return the folder with tokenizer and config.json, no weights fetched; or None."""
        ...

    def checkpoint(self) -> Path | None:
        """Return what `method=checkpoint` takes: the folder, or a file; None for a bare shape."""
        ...

    def architecture(self) -> dict[str, Any]:
        """Return the configuration as config.json has it, without weights or, if kept, network."""
        ...

    def identity(self, digests: Path) -> dict[str, Any]:
        """Return JSON that changes whenever the weights, tokenizer or architecture do.

        `digests` is a file that remembers the digests of large files by path, size and time.
        """
        ...

    def architecture_identity(self) -> dict[str, Any]:
        """Return JSON that changes whenever the architecture does; for sizes by arithmetic."""
        ...

    def original(self) -> ModelSource | None:
        """Return the unquantized model: `reference` where given, itself, or None: there is none."""
        ...


def unquantized(source: ModelSource) -> ModelSource:
    """Return the unquantized model of `source`.

    Raises:
        ConfigError: `source` is a quantized checkpoint and names no original.
    """
    original = source.original()
    if original is None:
        raise ConfigError(
            f"model {source.name} is quantized already; measure it as it is with method=checkpoint,"
            " name its unquantized original with model.reference=FOLDER or OWNER/NAME, or take the "
            "unquantized model"
        )
    return original


def reference_model(value: str | None) -> LocalModel | HubModel | None:
    """Return the model that `model.reference` names: a folder, or OWNER/NAME[@REVISION]."""
    if value is None:
        return None
    if Path(value).expanduser().is_dir():
        return LocalModel("local", value)
    id, _, revision = value.partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", id) is None:
        raise ConfigError(
            f"model.reference={value} is no folder here and no id of the hub; it must be the "
            "folder of the unquantized model, or OWNER/NAME, or OWNER/NAME@REVISION"
        )
    return HubModel("hub", id, revision or "main")


class FolderModel(ABC):
    """What models share that are here: everything is in a folder."""

    trust_remote_code: ClassVar[bool] = False
    random_weights: ClassVar[bool] = False
    config: ClassVar[None] = None

    def architecture(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return read_config(self.folder())

    def architecture_identity(self) -> dict[str, Any]:
        """Return the digest of config.json's content."""
        return {"kind": "architecture", "sha256": digest(self.architecture())}

    @abstractmethod
    def folder(self) -> Path:
        """Return the folder."""

    def tokenizer_folder(self) -> Path:
        """Return the folder."""
        return self.folder()

    def checkpoint(self) -> Path:
        """Return the folder."""
        return self.folder()


@dataclass(frozen=True)
class EmbeddedModel(FolderModel):
    """The demonstration model that the project trained itself and carries with it."""

    name: str

    allow_pickle: ClassVar[bool] = False

    def folder(self) -> Path:
        """Return the folder beside the code."""
        folder = Path(__file__).resolve().parent / "embedded" / "model"
        if not (folder / WEIGHTS).is_file():
            raise ConfigError(
                f"the embedded model's weights are not in {folder}: the installation is incomplete;"
                f" install again, or pass {LOCAL_INSTEAD}"
            )
        return folder

    def identity(self, digests: Path) -> dict[str, Any]:
        """Return the digest of the model's files."""
        return {"kind": "embedded", "sha256": folder_digest(self.folder(), False, digests)}

    def original(self) -> ModelSource:
        """Return the model itself."""
        return self


@dataclass(frozen=True)
class LocalModel(FolderModel):
    """A folder in Hugging Face layout: config.json, safetensors, tokenizer.

    Attributes:
        name: as tables show it; `local` stands for the folder's own name.
        path: the folder; `~` is expanded, a relative path starts where the command was given.
        allow_pickle: read pytorch_model.bin where there is no safetensors file.
        reference: of a quantized checkpoint: folder or hub id of the unquantized model that it is
            compared with; null: there is none.
    """

    name: str
    path: str
    allow_pickle: bool = False
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.name == "local":
            object.__setattr__(self, "name", Path(self.path).expanduser().resolve().name)

    def folder(self) -> Path:
        """Return the folder as an absolute path.

        Raises:
            ConfigError: it is missing, or holds no config.json.
        """
        folder = Path(self.path).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(
                f"model.path={self.path}: there is no folder {folder}; it must be a folder in "
                "Hugging Face layout (config.json, model.safetensors, tokenizer.json)"
            )
        if not (folder / CONFIG).is_file():
            raise ConfigError(
                f"{folder} holds no {CONFIG}; model.path must be a folder in Hugging Face layout "
                "(config.json, model.safetensors, tokenizer.json)"
            )
        return folder

    def identity(self, digests: Path) -> dict[str, Any]:
        """Return the digest of the model's files; the path does not count."""
        sha = folder_digest(self.folder(), self.allow_pickle, digests)
        reference = reference_identity(self.reference, self.architecture(), digests)
        return {"kind": "local", "sha256": sha, **reference}

    def original(self) -> ModelSource | None:
        """Return the reference; without one the model itself, if it is unquantized."""
        return reference_model(self.reference) or (
            None if _is_quantized(self.architecture()) else self
        )


@dataclass(frozen=True)
class HubModel:
    """A model of the Hugging Face hub.

    Attributes:
        name: as tables show it; `hub` stands for the id.
        id: `owner/name`.
        revision: branch, tag or commit; the commit it stands for is in every record.
        config: the architecture as in its config.json, kept here so that sizes need no network;
            null: it is fetched.
        allow_pickle: read pytorch_model.bin where there is no safetensors file.
        reference: as for a local model.
    """

    name: str
    id: str | None
    revision: str = "main"
    config: Mapping[str, Any] | None = None
    allow_pickle: bool = False
    reference: str | None = None

    trust_remote_code: ClassVar[bool] = False
    random_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.name == "hub" and self.id:
            object.__setattr__(self, "name", self.id)
        if self.config is not None:
            object.__setattr__(self, "config", checked_config(self.config))

    @property
    def _repository(self) -> Repository:
        if not self.id:
            raise ConfigError("model.id has no value; give one: model.id=OWNER/NAME")
        return Repository("model", self.id, self.revision, LOCAL_INSTEAD)

    def folder(self) -> Path:
        """Return the local copy of the needed files, fetched where it is incomplete."""
        patterns = [*FILES, POOLING, *SAFETENSORS_PATTERNS]
        if not self.allow_pickle:
            return self._repository.folder(patterns, self._lacks)
        folder = self._repository.folder(patterns, _lacks_config)
        if self._lacks(folder) is None:
            return folder
        return self._repository.folder([*patterns, *PICKLE_PATTERNS], self._lacks)

    def checkpoint(self) -> Path:
        """Return the folder."""
        return self.folder()

    def tokenizer_folder(self) -> Path:
        """Return the local copy of configuration and tokenizer, fetched where it is incomplete."""
        return self._repository.folder([*FILES], _lacks_tokenizer)

    def _lacks(self, folder: Path) -> str | None:
        if not (folder / CONFIG).is_file():
            return _lacks_config(folder)
        try:
            weight_files(folder, self.allow_pickle)
        except ConfigError:
            return no_weights(self.allow_pickle)
        return _lacks_tokenizer(folder)

    def architecture(self) -> dict[str, Any]:
        """Return the configuration kept here, else the one on the hub."""
        if self.config is not None:
            return dict(self.config)
        return read_config(self._repository.folder([CONFIG], _lacks_config))

    def identity(self, digests: Path) -> dict[str, Any]:
        """Return the id and the commit that the revision stands for."""
        commit = self._repository.commit()
        reference = {}
        if self.reference is not None:
            reference = reference_identity(self.reference, self.architecture(), digests)
        return {"kind": "hub", "id": self.id, "commit": commit, **reference}

    def original(self) -> ModelSource | None:
        """Return the reference; without one the model itself, if it is unquantized."""
        return reference_model(self.reference) or (
            None if _is_quantized(self.architecture()) else self
        )

    def architecture_identity(self) -> dict[str, Any]:
        """Return the digest of the configuration."""
        return {"kind": "architecture", "sha256": digest(self.architecture())}


def _is_quantized(config: Mapping[str, Any]) -> bool:
    return "quantization_config" in config


def reference_identity(
    value: str | None,
    architecture: Mapping[str, Any],
    digests: Path,
    shared: Sequence[str] = SHAPE_OF_ARCHITECTURE,
) -> dict[str, Any]:
    """Return what a model's identity says of its reference.

    Raises:
        ConfigError: the reference differs from `architecture` in one of the values `shared`.
    """
    reference = reference_model(value)
    if reference is None:
        return {}
    other = reference.architecture()
    for key in shared:
        if other.get(key) != architecture.get(key):
            raise ConfigError(
                f"model.reference={value} is another model than the checkpoint: its {key} is "
                f"{other.get(key)}, the checkpoint's {architecture.get(key)}; name the model that "
                "the checkpoint was made from"
            )
    return {"reference": reference.identity(digests)}


def _lacks_config(folder: Path) -> str | None:
    if (folder / CONFIG).is_file():
        return None
    return f"has no {CONFIG}: it is no model in transformers' layout"


def _lacks_tokenizer(folder: Path) -> str | None:
    if any((folder / name).is_file() for name in TOKENIZER_MODELS):
        return _lacks_config(folder)
    return f"has no tokenizer ({', '.join(TOKENIZER_MODELS)})"
