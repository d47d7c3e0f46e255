"""What the records say of tasks: their parts, their questions, and where chance lies.

`details.tasks` of a record has an entry for each task and group of tasks: `group` (the innermost
group it is part of), `questions` (a digest of its questions), `count`, and where it is known
`chance` (the score of an answer drawn at random). Records that say nothing of a task are older,
and its questions are then known by their protocol and number alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.record import Value
from reports import protocols
from reports.rows import Row, family, mapping, number


def facts(row: Row, task: str) -> Mapping[str, Any]:
    """Return what `row` says of `task`, nothing where it says nothing."""
    return mapping(mapping(row.record.details.get("tasks")).get(task))


def questions(row: Row, value: Value) -> str:
    """Return the digest of the questions behind `value`, empty where the record has none."""
    if family(value) != "tasks":
        return ""
    return str(facts(row, protocols.task_of(value.protocol)).get("questions") or "")


def chance(row: Row, task: str) -> float | None:
    """Return the score of random answers to `task`, None where the record does not say."""
    return number(facts(row, task).get("chance"))


@dataclass(frozen=True)
class Hierarchy:
    """Which task is part of which group; `above` has the innermost group of each part."""

    above: Mapping[str, str]

    def is_top(self, task: str) -> bool:
        """Whether `task` is part of no group."""
        return task not in self.above

    def is_part(self, task: str) -> bool:
        """Whether `task` is one of the parts that a group is made of, itself no group."""
        return task in self.above and task not in self._groups

    def top(self, task: str) -> str:
        """Return the outermost group that `task` is part of, `task` itself where there is none."""
        seen = {task}
        while (found := self.above.get(task, "")) and found not in seen:
            seen.add(found)
            task = found
        return task

    @cached_property
    def _groups(self) -> frozenset[str]:
        return frozenset(self.above.values())


def hierarchy(rows: Iterable[Row]) -> Hierarchy:
    """Return the groups of tasks that `rows` know."""
    return Hierarchy(
        {
            str(task): str(group)
            for row in rows
            for task, entry in mapping(row.record.details.get("tasks")).items()
            if (group := mapping(entry).get("group"))
        }
    )
