"""A model whose folder an installed Python package carries. Torch-free.

The package is found, not imported: what it does at its import (sentence-transformers and more) is
not needed to read its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from harness.folders import CONFIG, folder_digest
from harness.models import FolderModel, ModelSource
from kernels.errors import ConfigError


@dataclass(frozen=True)
class PackageModel(FolderModel):
    """The folder `subfolder`, in Hugging Face layout, of the installed package `package`.

    Attributes:
        name: as tables show it.
        package: what Python imports, a name without dots.
        distribution: what pip installs.
        subfolder: where in the package the model lies.
    """

    name: str
    package: str
    distribution: str
    subfolder: str

    allow_pickle: ClassVar[bool] = False

    def folder(self) -> Path:
        """Return the folder.

        Raises:
            ConfigError: the package is not installed, or holds no model there.
        """
        spec = find_spec(self.package) if self.package.isidentifier() else None
        places = spec.submodule_search_locations if spec is not None else None
        if not places:
            raise ConfigError(
                f"model {self.name} lies in the package {self.distribution}, which is not "
                f"installed here; install it: python -m pip install {self.distribution}"
            )
        folder = Path(next(iter(places))) / self.subfolder
        if not (folder / CONFIG).is_file():
            raise ConfigError(
                f"the package {self.distribution} holds no {CONFIG} in {self.subfolder}; install "
                f"it again: python -m pip install --force-reinstall {self.distribution}"
            )
        return folder

    def identity(self, digests: Path) -> dict[str, str]:
        """Return the digest of the model's files."""
        return {"kind": "package", "sha256": folder_digest(self.folder(), False, digests)}

    def original(self) -> ModelSource:
        """Return the model itself."""
        return self
