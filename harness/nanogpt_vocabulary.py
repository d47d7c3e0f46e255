"""The characters of a nanoGPT model: `meta.pkl`, read without running what it says, as a tokenizer.

nanoGPT keeps its vocabulary of characters in a pickle, `{"vocab_size": n, "stoi": {character: id},
"itos": {id: character}}`. A pickle is a program: it names functions and calls them. The reader here
knows dictionaries, strings and whole numbers; at the first name of anything else it stops.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from kernels.errors import ConfigError

META_LIMIT_BYTES = 16 << 20
"""Every character there is makes a file of this order; more is no vocabulary of characters."""
UNKNOWN = "<unknown>"


class _RefusedError(Exception):
    """A pickle names something that is not plain data."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, strings and numbers; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse: nothing is looked up, so nothing is imported or called."""
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse: there is nothing outside the file."""
        raise _RefusedError("a persistent object")


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
        meta = _PlainUnpickler(BytesIO(content)).load()
    except _RefusedError as error:
        raise ConfigError(
            f"model.meta={path} is refused: it holds more than dictionaries, strings and numbers "
            f"({error}), and a pickle that names code can run it; nothing of it was run"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
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
                f"{character!r:.40}: {id!r:.40}"
            )
    if len(set(known.values())) != len(known) or min(known.values()) < 0:
        raise ConfigError(
            f"model.meta={path}: ids in stoi must be 0 or more, each for one character"
        )
    if shown != {id: character for character, id in known.items()}:
        raise ConfigError(f"model.meta={path}: itos is not the inverse of stoi")
    return known


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
