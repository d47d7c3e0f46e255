"""The Hugging Face hub: which commit a name stands for, and the few files of it that are needed.

Through huggingface_hub, so its cache, its login and its variables (HF_HOME, HF_HUB_OFFLINE,
HF_ENDPOINT, HF_TOKEN) hold. What the local cache has is used without asking the network.
Torch-free; nothing is imported or reached before a function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kernels.errors import ConfigError

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repository:
    """One repository of the hub at one revision.

    Attributes:
        kind: models and data sets have separate names.
        id: `owner/name`, or `name` for the oldest.
        revision: branch, tag or commit.
        instead: what the user may pass in its place; ends every sentence of failure.
    """

    kind: Kind
    id: str
    revision: str
    instead: str

    def cached(self) -> Path | None:
        """Return the folder of the revision in the local cache, whole or in part, or None."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with self._failures_told():
            try:
                # No pattern matches, so what the folder lacks is for the caller to judge.
                folder = snapshot_download(
                    self.id,
                    repo_type=self.kind,
                    revision=self.revision,
                    allow_patterns=[],
                    local_files_only=True,
                )
            except LocalEntryNotFoundError:
                return None
        return Path(folder)

    def commit(self) -> str:
        """Return the commit the revision stands for: the cached one, else what the hub says.

        Raises:
            ConfigError: the hub does not know it, refuses it or cannot be reached.
        """
        from huggingface_hub import HfApi, constants

        folder = self.cached()
        if folder is not None:
            return folder.name
        with self._failures_told():
            info = HfApi().repo_info(
                self.id,
                repo_type=self.kind,
                revision=self.revision,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        return str(info.sha)

    def folder(self, patterns: Sequence[str], lacks: Callable[[Path], str | None]) -> Path:
        """Return a local folder with the files that `patterns` name, fetched where they are absent.

        `lacks(folder)` returns what an incomplete folder misses, as the end of a sentence.

        Raises:
            ConfigError: a file cannot be had; the sentence says which and why.
        """
        from huggingface_hub import snapshot_download

        folder = self.cached()
        if folder is not None and lacks(folder) is None:
            return folder
        with self._failures_told():
            # The commit of what is cached, so that the folder is the one `commit` names.
            revision = folder.name if folder is not None else self.revision
            folder = Path(
                snapshot_download(
                    self.id,
                    repo_type=self.kind,
                    revision=revision,
                    allow_patterns=list(patterns),
                )
            )
        missing = lacks(folder)
        if missing is not None:
            raise ConfigError(f"{self.kind} {self.id} on the Hugging Face hub {missing}")
        return folder

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into one sentence; a full disk stays what it is."""
        import httpx
        from huggingface_hub import constants, errors

        where = f"{self.kind} {self.id}"
        try:
            yield
        except errors.GatedRepoError as error:
            raise ConfigError(
                f"{where} is gated: accept its terms at https://huggingface.co/{self._page} and "
                f"log in with `hf auth login` or HF_TOKEN, or pass {self.instead}"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ConfigError(
                f"{where} is not on the Hugging Face hub, or is private and needs a login "
                f"(`hf auth login` or HF_TOKEN); check the id, or pass {self.instead}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ConfigError(
                f"{where} has no revision {self.revision!r}; take a branch, tag or commit that is "
                f"listed at https://huggingface.co/{self._page}/commits/main"
            ) from error
        except errors.HFValidationError as error:
            raise ConfigError(
                f"{self.id!r} cannot be the id of a {self.kind}; "
                f"ids look like owner/name, or pass {self.instead}"
            ) from error
        except (
            errors.OfflineModeIsEnabled,
            errors.LocalEntryNotFoundError,
            errors.HfHubHTTPError,
            httpx.HTTPError,
        ) as error:
            absent = f"{where} is not (or not wholly) in the local cache and"
            if constants.HF_HUB_OFFLINE:
                raise ConfigError(
                    f"{absent} HF_HUB_OFFLINE is set; unset it, or pass {self.instead}"
                ) from error
            # Where the cache was tried after the network, the network's answer is the cause.
            cause = error.__cause__ or error
            reason = " ".join(str(cause).partition("\n")[0].split())
            raise ConfigError(
                f"{absent} the Hugging Face hub cannot be reached "
                f"({type(cause).__name__}: {reason}); pass {self.instead}"
            ) from error

    @property
    def _page(self) -> str:
        return self.id if self.kind == "model" else f"datasets/{self.id}"
