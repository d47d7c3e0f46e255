"""Names of modules that a checkpoint gives as regular expressions, and libraries match by `re`.

An expression can be written so that matching a name of 60 letters takes longer than the universe
has: a repetition inside a repetition, or alternatives that are repeated. Real checkpoints need
neither, so those are refused before a library sees them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kernels.errors import ConfigError

LONGEST = 1000
MOST_REPETITIONS = 4
"""Unbounded repetitions side by side: the time grows with the length to this power at most."""

_ESCAPED = re.compile(r"\\.")
_SET = re.compile(r"\[\^?\]?[^\]]*\]")
_GROUP = re.compile(r"\(\?[:=!]|\(\?P?<\w*[=!>]|\(")
_INNERMOST = re.compile(r"\(([^()]*)\)([*+{]?)")
_REPEATED = re.compile(r"[*+{]")


def check_patterns(what: str, given: Any) -> None:
    """Refuse what is no list of expressions (or mapping by expression) that are safe to match.

    Raises:
        ConfigError: `given`, which `what` names, is something else, or one is not safe or no
            expression.
    """
    if given is None:
        return
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list | Mapping) or not all(isinstance(one, str) for one in found):
        raise ConfigError(f"{what} is no list of names or expressions")
    for one in found:
        # GPTQModel marks rules that take out or add; compressed-tensors marks expressions.
        pattern = re.sub(r"^([+-]:|re:)", "", one)
        if (reason := unsafe(pattern)) is not None:
            raise ConfigError(f"{what} has the expression {one!r:.60}, which {reason}")


def unsafe(pattern: str) -> str | None:
    """Return why `pattern` may not be matched, as the end of a sentence; None: it may."""
    if len(pattern) > LONGEST:
        return f"is longer than {LONGEST} characters"
    # What is escaped or in a set is one character.
    plain = _GROUP.sub("(", _SET.sub("x", _ESCAPED.sub("x", pattern)))
    if len(_REPEATED.findall(plain)) > MOST_REPETITIONS:
        return f"repeats more than {MOST_REPETITIONS} times"
    while match := _INNERMOST.search(plain):
        inside, repeated = match.groups()
        if repeated and (_REPEATED.search(inside) or "|" in inside):
            return "repeats what is repeated or has alternatives; matching it may never end"
        # What was repeated inside stays visible outside.
        kept = "x*" if _REPEATED.search(inside) else "x|x" if "|" in inside else "x"
        plain = plain[: match.start()] + kept + repeated + plain[match.end() :]
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression ({error})"
    return None
