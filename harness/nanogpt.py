"""A checkpoint of karpathy's nanoGPT as a model. Torch-free: a child converts it.

The children read a folder in Hugging Face layout, made once from the checkpoint
(`harness.nanogpt_convert`) and kept under the digest of what it is made from, beside the other
things that cells share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.folders import CONFIG, TOKENIZER_FILES, files_digest, present, read_config
from harness.hub import Repository
from harness.identity import code_digest
from harness.models import ModelSource
from harness.record import digest
from kernels.errors import ConfigError

GPT2 = "openai-community/gpt2"
KEY_LENGTH = 24


@dataclass(frozen=True)
class NanoGptModel:
    """What nanoGPT's train.py leaves: `ckpt.pt`, and for a model of characters its `meta.pkl`.

    Attributes:
        name: as tables show it.
        path, meta: the files; `~` is expanded, a relative path starts where the command was given.
            `meta` null: the model reads GPT-2's tokens.
        cache: folder that keeps what is made of a checkpoint.
        tokenizer: folder or hub id (OWNER/NAME) of GPT-2's tokenizer; null: the hub's gpt2.
    """

    name: str
    path: str
    cache: str
    meta: str | None = None
    tokenizer: str | None = None

    trust_remote_code: ClassVar[bool] = False
    random_weights: ClassVar[bool] = False
    allow_pickle: ClassVar[bool] = False
    config: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.meta is not None and self.tokenizer is not None:
            raise ConfigError(
                "model.meta and model.tokenizer are both given; a model of characters has "
                "model.meta=meta.pkl alone, one of GPT-2's tokens model.tokenizer alone"
            )

    def folder(self) -> Path:
        """Return the converted checkpoint, made where it is not there yet.

        Raises:
            ConfigError: a file is missing, holds more than plain data, or is no nanoGPT checkpoint.
        """
        cache = Path(self.cache).expanduser().resolve()
        identity = self.identity(cache / "digests.json")
        folder = cache / digest(identity)[:KEY_LENGTH]
        if not (folder / CONFIG).is_file():
            from harness.nanogpt_convert import convert

            convert(self._checkpoint(), self._meta(), self._tokenizer(), folder)
        return folder

    def tokenizer_folder(self) -> Path:
        """Return the converted checkpoint's folder."""
        return self.folder()

    def checkpoint(self) -> Path:
        """Return the converted checkpoint's folder."""
        return self.folder()

    def _checkpoint(self) -> Path:
        return _file("model.checkpoint", self.path, "ckpt.pt that nanoGPT's train.py wrote")

    def _meta(self) -> Path | None:
        if self.meta is None:
            return None
        return _file("model.meta", self.meta, "meta.pkl that nanoGPT's prepare.py wrote")

    def _repository(self) -> Repository | None:
        """Return where GPT-2's tokenizer is on the hub; None: it is here, or not needed."""
        given = self.tokenizer
        if self.meta is not None or (given is not None and Path(given).expanduser().is_dir()):
            return None
        if (
            given is not None
            and given != "gpt2"
            and re.fullmatch(r"[\w.-]+/[\w.-]+", given) is None
        ):
            raise ConfigError(
                f"model.tokenizer={given} is no folder here and no id of the hub; it must be a "
                "folder with GPT-2's vocab.json and merges.txt (or tokenizer.json), or OWNER/NAME"
            )
        id = GPT2 if given in (None, "gpt2") else given
        return Repository("model", str(id), "main", "GPT-2's tokenizer with model.tokenizer=FOLDER")

    def _tokenizer(self) -> Path | None:
        """Return the folder of GPT-2's tokenizer, fetched if need be; None: there is a meta."""
        repository = self._repository()
        if repository is not None:
            return repository.folder([*TOKENIZER_FILES], _lacks_tokenizer)
        if self.tokenizer is None:
            return None
        folder = Path(self.tokenizer).expanduser().resolve()
        lack = _lacks_tokenizer(folder)
        if lack is not None:
            raise ConfigError(f"model.tokenizer={self.tokenizer}: {folder} {lack}")
        return folder

    def architecture(self) -> dict[str, Any]:
        """Return the content of the converted checkpoint's config.json."""
        return read_config(self.folder())

    def identity(self, digests: Path) -> dict[str, Any]:
        """Return the digests of the files and of the code that converts; paths do not count."""
        files = {"checkpoint": self._checkpoint()}
        meta = self._meta()
        if meta is not None:
            files["meta"] = meta
        found: dict[str, Any] = {
            role: files_digest([file], digests) for role, file in files.items()
        }
        repository = self._repository()
        if repository is not None:
            found["tokenizer"] = {"id": repository.id, "commit": repository.commit()}
        elif self.tokenizer is not None and (folder := self._tokenizer()) is not None:
            found["tokenizer"] = files_digest(present(folder, TOKENIZER_FILES), digests)
        return {"kind": "nanogpt", **found, "code": code_digest("harness.nanogpt_convert")}

    def architecture_identity(self) -> dict[str, Any]:
        """Return the digest of the files: what they say of the architecture needs torch."""
        cache = Path(self.cache).expanduser().resolve()
        return {"kind": "architecture", "sha256": digest(self.identity(cache / "digests.json"))}

    def original(self) -> ModelSource:
        """Return the model itself."""
        return self


def nanogpt_model(
    name: str, checkpoint: str, cache: str, meta: str | None = None, tokenizer: str | None = None
) -> NanoGptModel:
    """Return the model; `checkpoint` is the option's name, and a question that a model answers."""
    return NanoGptModel(name, checkpoint, cache, meta, tokenizer)


def _file(option: str, value: str, wanted: str) -> Path:
    path = Path(value).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{option}={value}: there is no file {path}; it must be the {wanted}")
    return path


def _lacks_tokenizer(folder: Path) -> str | None:
    """Return why `folder` holds no GPT-2 tokenizer, as the end of a sentence; None: it does."""
    names = {path.name for path in present(folder, TOKENIZER_FILES)}
    if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names:
        return None
    return "holds no GPT-2 tokenizer (vocab.json and merges.txt, or tokenizer.json)"
