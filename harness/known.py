"""What is found once while the cells of a sweep are planned, and holds for all of them.

A plan of thousands of cells asks for the same digests again and again. Within one plan the code,
the libraries, models and texts count as they were at the first look. Each cell that then runs asks
afresh, so a change in between comes out there. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")


class Known:
    """Remembers what functions found, by what they were asked."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], Any] = {}

    def once(self, asked: tuple[str, ...], find: Callable[[], Found]) -> Found:
        """Return what `find` returned the first time that `asked` was asked; errors are not kept.

        What is returned is shared by all who ask, so none of them changes it.
        """
        if asked not in self._found:
            self._found[asked] = find()
        found: Found = self._found[asked]
        return found

    def shared(self, node: Found) -> Found:
        """Return the first of all nodes (JSON-like data) that are equal to `node`.

        Thousands of configurations then hold each suite and each piece of hardware once.
        """
        return self.once(("node", text_of(node)), lambda: node)


def text_of(node: Any) -> str:
    """Return JSON-like data as a text that equal data share, in the order of their keys."""
    return json.dumps(node, ensure_ascii=False)
