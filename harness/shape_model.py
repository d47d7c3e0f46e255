"""A bare shape as a model: an architecture with random weights. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.folders import (
    TOKENIZER_FILES,
    TOKENIZER_MODELS,
    checked_config,
    files_digest,
    present,
    read_json,
)
from harness.models import ModelSource
from harness.record import digest
from kernels.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ShapeModel:
    """An architecture with seeded random weights: for speed, memory and size, never for quality.

    Attributes:
        config: the architecture as in a config.json, or the path of such a file.
        tokenizer: a folder with a tokenizer, or null for none.
        seed: seed of the weights.
        dtype: floating type that the weights count as stored in.
    """

    name: str
    config: Any
    tokenizer: str | None = None
    seed: int = 0
    dtype: str = "bfloat16"

    trust_remote_code: ClassVar[bool] = False
    random_weights: ClassVar[bool] = True
    allow_pickle: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"model.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}"
            )
        config = self.config
        if isinstance(config, str):
            config = read_json(Path(config).expanduser(), "model.config")
        object.__setattr__(self, "config", {**checked_config(config), "dtype": self.dtype})

    def folder(self) -> None:
        """There is no folder: return None."""

    def checkpoint(self) -> None:
        """There are no files: return None."""

    def tokenizer_folder(self) -> Path | None:
        """Return the folder of the tokenizer, or None.

        Raises:
            ConfigError: the folder is missing or holds no tokenizer.
        """
        if self.tokenizer is None:
            return None
        folder = Path(self.tokenizer).expanduser().resolve()
        if not any((folder / name).is_file() for name in TOKENIZER_MODELS):
            raise ConfigError(
                f"model.tokenizer={self.tokenizer}: {folder} holds no tokenizer "
                f"({', '.join(TOKENIZER_MODELS)})"
            )
        return folder

    def original(self) -> ModelSource:
        """Return the shape itself."""
        return self

    def architecture(self) -> dict[str, Any]:
        """Return the configuration."""
        return dict(self.config)

    def identity(self, digests: Path) -> dict[str, Any]:
        """Return the digests of configuration and tokenizer, and the seed."""
        folder = self.tokenizer_folder()
        tokenizer = files_digest(present(folder, TOKENIZER_FILES), digests) if folder else None
        return {
            "kind": "shape",
            "sha256": digest(self.architecture()),
            "seed": self.seed,
            "tokenizer": tokenizer,
        }

    def architecture_identity(self) -> dict[str, Any]:
        """Return the digest of the configuration."""
        return {"kind": "architecture", "sha256": digest(self.architecture())}
