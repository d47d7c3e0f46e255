"""Cells by the kind of hardware that they run on: what a launcher is told for each kind.

A kind is what `hardware.launch` asks of the launcher in use; cells that ask for the same are one
launch. Where jobs run on other machines than the driver, each says on which one it was planned, so
that no speed is measured on a machine and written down for another.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from harness.cell import Cell
from harness.hardware import has_card, machine_name
from kernels.errors import ConfigError

Planned = tuple[Cell, list[str]]
"""A cell and the overrides that make it."""


@dataclass(frozen=True)
class Kind:
    """The cells of one launch.

    Attributes:
        options: what `hardware.launch` asks of the launcher, in the place of its own options.
        cells: in order.
    """

    options: dict[str, Any]
    cells: list[Planned] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The hardware of the cells."""
        return ", ".join(dict.fromkeys(cell.config["hardware"]["name"] for cell, _ in self.cells))


def kinds_of(cells: Sequence[Planned], launcher: str, known: Collection[str]) -> list[Kind]:
    """Return the kinds of `cells`, whose order stays as it is within each.

    Args:
        cells: what is to be run.
        launcher: name of the launcher in use; what `hardware.launch` says of others is not for it.
        known: its options.

    Raises:
        ConfigError: an option that the launcher does not have, or one name for several machines.
    """
    kinds: dict[str, Kind] = {}
    machines: dict[str, str | None] = {}
    for cell, point in cells:
        hardware = cell.config["hardware"]
        name, machine = hardware["name"], hardware.get("machine")
        if machines.setdefault(name, machine) != machine:
            raise ConfigError(
                f"hardware {name} stands for several machines, {machines[name] or 'this one'} and "
                f"{machine or 'this one'}, whose rows would be compared; give each a name of its "
                "own: hardware.name=NAME"
            )
        options = hardware.get("launch", {}).get(launcher, {})
        unknown = [option for option in options if option not in known]
        if unknown:
            raise ConfigError(
                f"hardware {name} has launch.{launcher}.{unknown[0]}, and launcher {launcher} has "
                f"no such option; it has {', '.join(sorted(known)) or 'none'}"
            )
        key = json.dumps(options, sort_keys=True)
        kinds.setdefault(key, Kind(options)).cells.append((cell, point))
    return list(kinds.values())


def for_elsewhere(cells: Sequence[Planned]) -> list[Planned]:
    """Return `cells` with overrides that name the machine: they run on another than this one.

    Raises:
        ConfigError: a cell needs a card, none is here, and which machine has it is not said.
    """
    return [(cell, [*point, *_machine_override(cell)]) for cell, point in cells]


def _machine_override(cell: Cell) -> list[str]:
    hardware = cell.config["hardware"]
    if hardware.get("machine"):
        return []
    if hardware["device"] == "cuda" and not has_card():
        raise ConfigError(
            f"hardware {hardware['name']} runs on another machine, and this one has no CUDA card "
            "to plan for; give processor and card of that machine as hardware.machine. "
            "There, python -c 'from harness.hardware import machine_name; "
            'print(machine_name("cuda"))\' prints them'
        )
    name = QuotedString(machine_name(hardware["device"]), Quote.single)
    return [f"hardware.machine={name.with_quotes()}"]
