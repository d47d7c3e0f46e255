"""Evaluation and calibration text: where it comes from, its identity, and its tokens.

The classes with a `name` are what `conf/data/*.yaml` instantiate. Torch-free at import: the driver
asks them for digests. Rows of a data set become text in two ways: joined with two newlines (the
GPTQ protocol), or as the raw file they were cut from (the llama.cpp protocol).
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.hub import Repository
from harness.record import digest
from harness.rows import ROW_FORMATS, cell, column, read_rows, read_text, split_files
from kernels.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from harness.cache import Cache

Protocol = Literal["gptq", "llamacpp"]

HUB_CALIBRATION_CHARACTERS = 4_000_000
EMBEDDED_CALIBRATION_SEED = 0
EMBEDDED, WIKITEXT2 = "embedded", "wikitext2"
WIKITEXT2_TRAIN = ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text")
PROBES, PROBE_CHARACTERS, CONTAMINATED_SHARE = 200, 80, 0.05
UNKNOWN_SHOWN = 3
LOCAL_CALIBRATION = "data.source=local data.path=FOLDER"
LOCAL_INSTEAD = "data.source=local data.path=FOLDER, or data.source=text data.path=FILE"


@dataclass(frozen=True)
class Tokens:
    """A tokenized text.

    Attributes:
        text: name of the text (embedded, wikitext2, ...).
        ids: int64 [N]; `bos` stands first where there is one.
        bos: the id that the tokenizer puts before a text, None where it puts none.
        digest: SHA-256 of text, tokenizer and protocol.
    """

    text: str
    ids: Tensor
    bos: int | None
    digest: str


def windows(tokens: Tokens, seq_len: int, count: int | None = None) -> Tensor:
    """Cut `tokens` into windows that do not overlap: int64 [n, seq_len], the tail dropped.

    Raises:
        ConfigError: the text is shorter than one window.
    """
    whole = len(tokens.ids) // seq_len
    if whole == 0:
        raise ConfigError(
            f"text {tokens.text!r} has {len(tokens.ids)} tokens, less than one window of "
            f"{seq_len}; take a longer text (data.source, data.path) or a shorter window"
        )
    used = whole if count is None else min(count, whole)
    return tokens.ids[: used * seq_len].view(used, seq_len)


class Texts:
    """The texts of a data source as tokens of one model; each tokenized once and kept in a cache.

    `name` (embedded, wikitext2, ...) and `digest` are those of the evaluation text.
    """

    def __init__(self, source: DataSource, tokenizer: Any, cache: Cache) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.cache = cache
        self.name = source.text

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the evaluation text's rows."""
        return self.source.evaluation_digest()

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self._need_tokenizer())

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ConfigError(
                "the model has no tokenizer, so no text can be read with it; give one with "
                "model.tokenizer=FOLDER"
            )
        return self.tokenizer

    def tokens(self, protocol: Protocol) -> Tokens:
        """Return the evaluation text as `protocol` has it, BOS once where the tokenizer adds it.

        For `llamacpp` that is what its own tokenizer call gives; there the first token of each
        window is then replaced by `bos`.
        """
        make = {"gptq": self.source.joined_text, "llamacpp": self.source.raw_text}[protocol]
        bos = leading_token(self._need_tokenizer())
        key = self._key(self.digest, protocol)
        return Tokens(self.name, self._ids(key, make, bos), bos, digest(key))

    def calibration(self, samples: int, seq_len: int, seed: int) -> Tensor:
        """Return `samples` random crops of the calibration text, int64 [samples, seq_len].

        Crops may overlap, as in GPTQ's own sampling; no BOS is put before them.

        Raises:
            ConfigError: the text is shorter than one crop.
        """
        import torch

        key = self._key(self.source.calibration_digest(), "calibration")
        name = f"calibration text {self.source.calibration_name}"
        tokens = Tokens(name, self._ids(key, self.source.calibration_text, None), None, digest(key))
        windows(tokens, seq_len, 1)
        generator = torch.Generator().manual_seed(seed)
        last = len(tokens.ids) - seq_len
        starts = torch.randint(0, last + 1, (samples,), generator=generator)
        return tokens.ids[starts[:, None] + torch.arange(seq_len)]

    def _key(self, text: str, protocol: str) -> dict[str, str]:
        return {
            "text": text,
            "tokenizer": self._tokenizer_digest,
            "protocol": protocol,
            "tokenizers": metadata.version("tokenizers"),
        }

    def _ids(self, key: Mapping[str, str], make: Callable[[], str], bos: int | None) -> Tensor:
        import torch

        def build() -> dict[str, Tensor]:
            ids = encode(self.tokenizer, make())
            first = [] if bos is None else [bos]
            return {"ids": torch.tensor([*first, *ids], dtype=torch.int32)}

        return self.cache.get("tokens", key, build)["ids"].long()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of `text` as one piece, without special tokens.

    Raises:
        ConfigError: it has characters that the tokenizer neither knows nor has a token for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids
    # What the tokenizer's own call does, without the offsets that take half of its time.
    backend.no_truncation()
    backend.no_padding()
    try:
        found: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except Exception as error:  # tokenizers raises no narrower class
        if "[UNK]" not in str(error):
            raise
        unknown = sorted(set(text) - set(tokenizer.get_vocab()))
        more = ", ..." if len(unknown) > UNKNOWN_SHOWN else ""
        raise ConfigError(
            f"the text has {len(unknown)} characters that the model's vocabulary lacks "
            f"({', '.join(map(repr, unknown[:UNKNOWN_SHOWN]))}{more}); take a text of the "
            "characters the model was trained on (data.path, data.calibration)"
        ) from error
    return found


def leading_token(tokenizer: Any) -> int | None:
    """Return the id that `tokenizer` puts before a text by itself, or None."""
    text = "a"
    if tokenizer.convert_tokens_to_ids(text) is None:
        # A vocabulary of characters can do without any one of them.
        text = min(tokenizer.get_vocab())
    whole = tokenizer(text).input_ids
    bare = tokenizer(text, add_special_tokens=False).input_ids
    return int(whole[0]) if whole[:1] != bare[:1] else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([type(tokenizer).__name__, content, leading_token(tokenizer)])


class DataSource(ABC):
    """What every choice of `data` answers.

    Attributes:
        name: of the source, as records have it.
        text: of the evaluation text; the beginning of every protocol's name.
        calibration: what methods calibrate on, whatever is scored: `embedded`, a name that the
            source knows (`wikitext2`, `c4`, `wikipedia`, `code`), or the path of a text file (with
            a / or ending in .txt); None is the source's own default.
        default_calibration: that default; None where there is none.
        tasks: folder with the data of lm-eval's tasks, as the hub names them; None: the source's
            own folder if it has one, or else the hub.
    """

    name: str
    text: str
    calibration: str | None
    tasks: str | None
    default_calibration: ClassVar[str | None]

    @abstractmethod
    def rows(self) -> list[str]:
        """Return the rows of the evaluation text; raises ConfigError where they are missing."""

    @abstractmethod
    def named_calibration(self, name: str) -> str:
        """Return the calibration text the source has under `name`; ConfigError if it has none."""

    @property
    def calibration_name(self) -> str:
        """What is calibrated on; raises ConfigError where nothing was chosen and none is usual."""
        name = self.calibration or self.default_calibration
        if name is None:
            raise ConfigError(
                f"the method calibrates on text, and data.source={self.name} has none of its own; "
                "give one: data.calibration=FILE (another text than the one that is scored), or "
                "data.calibration=embedded"
            )
        return name

    def calibration_text(self) -> str:
        """Return the text that methods calibrate on; raises ConfigError where there is none."""
        name = self.calibration_name
        if name == EMBEDDED:
            return _embedded_calibration_text()
        if "/" in name or name.endswith(".txt"):
            return read_text(Path(name).expanduser().resolve(), "data.calibration")
        return self.named_calibration(name)

    def joined_text(self) -> str:
        """Return the rows joined with two newlines (GPTQ, AWQ)."""
        return "\n\n".join(self.rows())

    def raw_text(self) -> str:
        """Return the file the rows were cut from.

        A row that the hub has as "" is a line with one space in WikiText's raw files: so put
        together, the WikiText-2 test rows have the 1,290,590 bytes of wiki.test.raw.
        """
        rows = self.rows()
        return rows[0] if len(rows) == 1 else "".join(map(_line, rows))

    def evaluation_digest(self) -> str:
        """Return the SHA-256 of the evaluation text's rows."""
        return digest(self.rows())

    def calibration_digest(self) -> str:
        """Return the SHA-256 of the calibration text."""
        return hashlib.sha256(self.calibration_text().encode()).hexdigest()

    def contamination(self) -> str | None:
        """Return in one sentence how the calibration text flatters the evaluation, or None.

        Up to `PROBES` long lines of the evaluation text are looked for in the calibration text.
        """
        calibration = self.calibration_text()
        lines = [line.strip() for row in self.rows() for line in row.splitlines() if line.strip()]
        long = [line for line in lines if len(line) >= PROBE_CHARACTERS] or lines
        probes = long[:: -(-len(long) // PROBES)]
        found = sum(probe in calibration for probe in probes)
        # A few lines that any two texts of a kind share say nothing.
        if found >= CONTAMINATED_SHARE * len(probes):
            return (
                f"contaminated: {found} of {len(probes)} lines of the scored text stand in the "
                f"calibration text ({self.calibration_name})"
            )
        if self.calibration_name == self.text:
            return (
                f"calibrated on another part of {self.text}, the data set that is scored: "
                "its figures flatter methods that calibrate"
            )
        return None

    def task_folder(self) -> Path | None:
        """Return the folder that holds the data of tasks, None for the hub.

        Raises:
            ConfigError: there is no such folder.
        """
        if self.tasks is None:
            return None
        folder = Path(self.tasks).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(
                f"data.tasks={self.tasks}: there is no folder {folder}; it must hold data sets as "
                "the hub names them, such as Rowan/hellaswag/validation.parquet"
            )
        return folder

    def texts(self, tokenizer: Any, cache: Cache) -> Texts:
        """Return the texts as tokens of `tokenizer`, kept in `cache`."""
        return Texts(self, tokenizer, cache)


def _line(row: str) -> str:
    if not row:
        return " \n"
    return row if row.endswith("\n") else f"{row}\n"


@dataclass(frozen=True)
class EmbeddedData(DataSource):
    """Text of the invented world that the embedded demonstration model knows."""

    name: str
    text: str
    calibration: str | None = None
    tasks: str | None = None

    default_calibration: ClassVar[str] = EMBEDDED

    def __post_init__(self) -> None:
        _check_name(self.text)

    def rows(self) -> list[str]:
        """Return the held-out text, as one row."""
        path = Path(__file__).resolve().parent / "embedded" / "data" / "eval.txt"
        return [read_text(path, "the embedded evaluation text")]

    def named_calibration(self, name: str) -> str:
        """Refuse every name: the project carries no other text."""
        raise ConfigError(
            f"data.calibration={name}: data.source=embedded has no such text; leave it out, give a "
            f"text file, or name a folder that holds it: {LOCAL_CALIBRATION}"
        )


@cache
def _embedded_calibration_text() -> str:
    """Return text of a stream that neither training nor evaluation draws from."""
    from harness.embedded.generate import calibration_text

    return calibration_text(EMBEDDED_CALIBRATION_SEED)


@dataclass(frozen=True)
class LocalData(DataSource):
    """A folder with the hub's names and columns: `<dataset>/<subset>/<split>` in any row format.

    Attributes:
        path: the folder; `~` is expanded, a relative path starts where the command was given.
        dataset, subset, split, column: the evaluation text, as the hub names it; the data set may
            be with or without its owner.
        calibration: beside what every source knows, a file under `calibration/` (c4, wikipedia,
            code, ...); `wikitext2` is the train split of WikiText-2.
    """

    name: str
    text: str
    path: str
    dataset: str
    subset: str
    split: str
    column: str
    calibration: str | None = None
    tasks: str | None = None

    default_calibration: ClassVar[str] = "c4"

    def __post_init__(self) -> None:
        _check_name(self.text)

    def rows(self) -> list[str]:
        """Return the evaluation rows."""
        return self._split(self.dataset, self.subset, self.split, self.column)

    def _split(self, dataset: str, subset: str, split: str, name: str) -> list[str]:
        root = self._root()
        # In the hub's own layout the owner comes first.
        folders = [root / d / subset for d in dict.fromkeys((dataset, dataset.rpartition("/")[2]))]
        for folder in folders:
            files = split_files(folder, split)
            if files:
                return column(files, name)
        raise ConfigError(
            f"data.path={self.path} has no {folders[-1].relative_to(root)}/{split} "
            f"({', '.join(ROW_FORMATS)}); it must be a folder with the hub's names and columns"
        )

    def named_calibration(self, name: str) -> str:
        """Return the rows of file `calibration/<name>`, or of WikiText-2's train split."""
        root = self._root()
        files = split_files(root / "calibration", name)
        if files:
            return "\n\n".join(column(files, "text"))
        if name == WIKITEXT2:
            return "\n\n".join(self._split(*WIKITEXT2_TRAIN))
        raise ConfigError(
            f"data.path={self.path} has no calibration/{name} ({', '.join(ROW_FORMATS)}), which "
            "the method calibrates on; name another with data.calibration=NAME, or give a text file"
        )

    def task_folder(self) -> Path | None:
        """Return `tasks`, or the folder of the texts."""
        return super().task_folder() or self._root()

    def _root(self) -> Path:
        root = Path(self.path).expanduser().resolve()
        if not root.is_dir():
            raise ConfigError(
                f"data.path={self.path}: there is no folder {root}; it must be a folder with the "
                "hub's names and columns, such as wikitext/wikitext-2-raw-v1/test.parquet"
            )
        return root


@dataclass(frozen=True)
class HubData(DataSource):
    """Data sets of the Hugging Face hub, fetched once into its cache.

    Attributes:
        dataset, subset, split, column, revision: the evaluation text.
        calibrations: name -> one file of a data set to calibrate on (`dataset`, `file`, `column`);
            its first rows, 4 million characters of them. `wikitext2` is the train split.
    """

    name: str
    text: str
    dataset: str
    subset: str
    split: str
    column: str
    revision: str
    calibrations: Mapping[str, Mapping[str, str]]
    calibration: str | None = None
    tasks: str | None = None

    default_calibration: ClassVar[str] = "c4"

    def __post_init__(self) -> None:
        _check_name(self.text)

    def rows(self) -> list[str]:
        """Return the evaluation rows."""
        return self._split(self.dataset, self.subset, self.split, self.column)

    def _split(self, dataset: str, subset: str, split: str, name: str) -> list[str]:
        repository = Repository("dataset", dataset, self.revision, LOCAL_INSTEAD)

        def lacks(folder: Path) -> str | None:
            if split_files(folder / subset, split):
                return None
            return f"has no {subset}/{split} ({', '.join(ROW_FORMATS)})"

        names = [f"{subset}/{split}{end}" for end in ("-*.parquet", *ROW_FORMATS)]
        folder = repository.folder(names, lacks)
        return column(split_files(folder / subset, split), name)

    def named_calibration(self, name: str) -> str:
        """Return the beginning of the file that `calibrations` has under `name`."""
        if name == WIKITEXT2:
            return "\n\n".join(self._split(*WIKITEXT2_TRAIN))
        if name not in self.calibrations:
            known = ", ".join([EMBEDDED, WIKITEXT2, *self.calibrations])
            raise ConfigError(
                f"data.calibration={name}: data.source=hub knows {known}; name one of them, or "
                "give a text file"
            )
        source = self.calibrations[name]
        repository = Repository("dataset", source["dataset"], "main", LOCAL_INSTEAD)
        file = source["file"]

        def lacks(folder: Path) -> str | None:
            return None if (folder / file).is_file() else f"has no file {file}"

        folder = repository.folder([file], lacks)
        parts: list[str] = []
        length = 0
        for row in read_rows(folder / file):
            parts.append(cell(row, source["column"], folder / file))
            length += len(parts[-1])
            if length >= HUB_CALIBRATION_CHARACTERS:
                break
        return "\n\n".join(parts)


@dataclass(frozen=True)
class TextFile(DataSource):
    """A plain text file in UTF-8.

    Attributes:
        path: the evaluation text.
    """

    name: str
    text: str
    path: str
    calibration: str | None = None
    tasks: str | None = None

    default_calibration: ClassVar[None] = None

    def __post_init__(self) -> None:
        _check_name(self.text)

    def rows(self) -> list[str]:
        """Return the text, as one row."""
        return [read_text(Path(self.path).expanduser().resolve(), "data.path")]

    def named_calibration(self, name: str) -> str:
        """Refuse every name: a file brings no other text."""
        raise ConfigError(
            f"data.calibration={name}: data.source=text has no such text; give a text file, "
            f"'embedded', or name a folder that holds it: {LOCAL_CALIBRATION}"
        )


def _check_name(text: str) -> None:
    if not re.fullmatch(r"[a-z0-9_]+", text):
        raise ConfigError(
            f"data.text is {text!r}; it becomes part of column names, so it must be made of "
            "a-z, 0-9 and _"
        )
