"""The characters of a nanoGPT model: `meta.pkl`, read without running what it says, as a tokenizer.

nanoGPT keeps its vocabulary of characters in a pickle, `{"vocab_size": n, "stoi": {character: id},
"itos": {id: character}}`. A pickle is a program: it names functions and calls them, and even one
that names none can ask for gigabytes (a memo with a far index) or run for ever (a key made of
tuples of tuples). So it is not unpickled: `pickletools` takes it apart, and the reader here does
what its instructions say as far as they make dictionaries, lists, strings and numbers.
"""

from __future__ import annotations

import pickle  # nosec B403  # only written here, never loaded
import pickletools  # nosec B403  # takes a pickle apart and runs nothing of it
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from kernels.errors import ConfigError

META_LIMIT_BYTES = 16 << 20
"""Every character there is makes a file of this order; more is no vocabulary of characters."""
UNKNOWN = "<unknown>"


class _RefusedError(Exception):
    """A pickle names something that is not plain data."""


SKIPPED = frozenset(("PROTO", "FRAME"))
WRITTEN_OUT = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
"""Instructions that stand for the number or the string behind them."""
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NAMING = ("GLOBAL", "INST")
"""Instructions that name a function and have its name behind them."""
CALLING = (
    *("REDUCE", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX"),
    *("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"),
)
"""Instructions that call it, or name what stands elsewhere."""


class _Plain:
    """What the instructions of a pickle have made so far, of plain data alone."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do one instruction; raises _RefusedError where it makes anything else."""
        if name in SKIPPED:
            return
        if name in WRITTEN_OUT:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            self.stack.append({} if name == "EMPTY_DICT" else [])
        else:
            self._fill(name, argument)

    def _fill(self, name: str, argument: Any) -> None:
        """Do one instruction that makes or fills a dictionary or a list."""
        if name in ("DICT", "LIST"):
            parts = self._above()
            self.stack.append(_pairs(parts) if name == "DICT" else parts)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = _pairs(self._above() if name == "SETITEMS" else self._last(2))
            _of_kind(self.stack[-1], dict).update(pairs)
        elif name in ("APPEND", "APPENDS"):
            parts = self._above() if name == "APPENDS" else self._last(1)
            _of_kind(self.stack[-1], list).extend(parts)
        elif name in NAMING:
            raise _RefusedError(str(argument).replace(" ", "."))
        elif name == "STACK_GLOBAL":
            raise _RefusedError(".".join(str(part) for part in self._last(2)))
        elif name in CALLING:
            raise _RefusedError(f"the instruction {name}")
        else:
            raise ValueError(f"no vocabulary needs the instruction {name}")

    def _above(self) -> list[Any]:
        """Take what stands above the last mark."""
        mark = self.marks.pop()
        taken, self.stack = self.stack[mark:], self.stack[:mark]
        return taken

    def _last(self, count: int) -> list[Any]:
        taken = [self.stack.pop() for _ in range(count)]
        return taken[::-1]


def _pairs(parts: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _of_kind(found: Any, kind: type[Any]) -> Any:
    if type(found) is not kind:
        raise TypeError(f"something else than a {kind.__name__} is filled")
    return found


def _plain_data(content: bytes) -> Any:
    """Return the plain data that a pickle describes."""
    made = _Plain()
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name == "STOP":
            return made.stack[-1]
        made.step(instruction.name, argument)
    raise ValueError("it has no end")


def read_meta(path: Path) -> dict[str, int]:
    """Return character -> id of nanoGPT's `meta.pkl`.

    Raises:
        ConfigError: the file is missing, too large, damaged, or holds anything but plain data, or
            what it holds is no vocabulary of characters.
    """
    try:
        if path.stat().st_size > META_LIMIT_BYTES:
            raise ConfigError(
                f"model.meta={path} has {path.stat().st_size} bytes; a vocabulary of characters "
                f"has at most {META_LIMIT_BYTES}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model.meta={path} cannot be read: {error.strerror}") from error
    try:
        meta = _plain_data(content)
    except _RefusedError as error:
        raise ConfigError(
            f"model.meta={path} is refused: it holds more than dictionaries, strings and numbers "
            f"({str(error)[:80]!r}), and a pickle that names code can run it; nothing of it was run"
        ) from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise ConfigError(
            f"model.meta={path} cannot be read as a pickle ({type(error).__name__}); it must be "
            "the meta.pkl that nanoGPT's prepare.py wrote"
        ) from error
    return _checked(meta, path)


def _checked(meta: Any, path: Path) -> dict[str, int]:
    known = meta.get("stoi") if isinstance(meta, dict) else None
    shown = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(known, dict) or not isinstance(shown, dict) or not known:
        raise ConfigError(
            f"model.meta={path} holds no stoi and itos; it must be the meta.pkl that nanoGPT's "
            "prepare.py wrote"
        )
    for character, id in known.items():
        if not isinstance(character, str) or len(character) != 1 or type(id) is not int:
            raise ConfigError(
                f"model.meta={path}: stoi must map single characters to whole numbers, but holds "
                f"{_shown(character)}: {_shown(id)}"
            )
    if len(set(known.values())) != len(known) or min(known.values()) < 0:
        raise ConfigError(
            f"model.meta={path}: ids in stoi must be 0 or more, each for one character"
        )
    if shown != {id: character for character, id in known.items()}:
        raise ConfigError(f"model.meta={path}: itos is not the inverse of stoi")
    return known


def _shown(found: Any) -> str:
    """Return text and numbers as they are, of anything else (it may contain itself) its type."""
    return repr(found)[:40] if type(found) in (str, float, bool) else type(found).__name__


def write_meta(characters: Sequence[str], path: Path) -> None:
    """Write `characters`, numbered in their order, as nanoGPT's `meta.pkl`."""
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: id for id, character in enumerate(characters)},
    }
    path.write_bytes(pickle.dumps(meta))


def character_tokenizer(known: Mapping[str, int]) -> Tokenizer:
    """Return the tokenizer that makes every character (newlines and spaces too) one token.

    Decoding gives the text back exactly. A character that is not in `known` is an error of
    `tokenizers`, never left out: a tokenizer of pairs without merges would drop it silently.
    """
    tokenizer = Tokenizer(models.WordLevel(dict(known), unk_token=UNKNOWN))
    # (?s) would not do for Onigumo: its dot spares the newline, but \s and \S together are all.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
