"""The sweepers of `python run.py -m`: each cell of a grid once, unfinished cells only.

Here and not in `harness`, because Hydra takes plugins from the package of this name alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness.cell import Cell, plan_cell
from harness.jobs import refuse
from harness.sweep import plan_cells
from kernels.errors import ConfigError

ROWS = "job=cell"

Cells = dict[str, tuple[Cell, list[str]]]
"""Cell id -> the cell and the overrides that make it."""


class GridSweeper(Sweeper):
    """Runs the product of all swept values, each cell once.

    It composes every point, drops those that are the same cell (an unquantized method has no
    bits), refuses the sweep where a value cannot work, puts baselines first, and hands unfinished
    cells to whichever launcher is configured.

    Args:
        grids: the default: several grids by name, each Hydra overrides by key; see `points`.
    """

    def __init__(self, grids: DictConfig | None) -> None:
        self.grids = [dict(grid) for grid in (grids or {}).values()]
        self.loader: ConfigLoader | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives a sweeper."""
        self.loader = hydra_context.config_loader
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run every missing cell of the grid that `arguments` describe."""
        try:
            return self._launch(self._cells(points(self.grids, arguments, self.loader)))
        except ConfigError as error:
            refuse(error)

    def _launch(self, cells: Cells) -> Any:
        """Run those of `cells` that are not there.

        Raises:
            ConfigError: one cannot work.
        """
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir).absolute()
        missing = plan_cells([cell for cell, _ in cells.values()], folder)
        there = len(cells) - len(missing)
        print(f"{len(cells)} cells, {there} of them there already", flush=True)
        if not missing:
            return []
        return self.launcher.launch([cells[cell.id][1] for cell in missing], initial_job_idx=0)

    def _cells(self, points: list[list[str]]) -> Cells:
        """Compose every point; the first of several equal cells stands, baselines come first."""
        assert self.loader is not None
        assert self.config is not None
        cells: Cells = {}
        for point in points:
            composed = self.loader.load_sweep_config(self.config, point)
            if composed.job.name == "deploy":
                raise ConfigError(
                    "job=deploy decides on one configuration; run it without -m, once a profile"
                )
            with_hydra = OmegaConf.masked_copy(composed, [k for k in composed if k != "hydra"])
            cell = plan_cell(with_hydra, point)
            cells.setdefault(cell.id, (cell, point))
        ordered = sorted(
            cells.items(), key=lambda item: item[1][0].artefact_key != item[1][0].baseline_key
        )
        return dict(ordered)


class SearchSweeper(GridSweeper):
    """Looks for the best cell of the axes instead of running all of them: `conf/search/`."""

    def sweep(self, arguments: list[str]) -> Any:
        """Race the cells of the search's axes; those given in `arguments` take their place."""
        assert self.config is not None
        from harness.racing import Racing

        try:
            search = instantiate(self.config.search)
            own = _axes([f"{key}={value}" for key, value in search.axes.items()], self.loader)
            given = _axes(arguments, self.loader)
            # What describes the search is no part of a cell.
            asked = {
                key: values
                for key, values in given.items()
                if key.lstrip("+").partition(".")[0] != "search"
            }
            # The mode came from the search's file, which points leave out.
            asked["hydra.mode"] = ["hydra.mode=MULTIRUN"]
            asked.setdefault("suite", [f"suite={self.config.hydra.runtime.choices['suite']}"])
            Racing(search, {**own, **asked}, self._cells, self._launch).run(self.config, arguments)
        except InstantiationException as error:
            refuse(ConfigError(str(error.__cause__ or error).splitlines()[0]))
        except ConfigError as error:
            refuse(error)


def points(
    grids: Sequence[Mapping[str, Any]], arguments: Sequence[str], loader: ConfigLoader | None
) -> list[list[str]]:
    """Return the overrides of every point of the default `grids` under the command line's.

    Each grid is the product of its own axes; an axis given in `arguments` takes its place in every
    grid. Methods given there choose the grids: each runs with the axes of those that name it, one
    that none names with what was given alone. The grids are those of rows: another job has none.

    Raises:
        ConfigError: an axis is no list of values.
    """
    given = _axes(arguments, loader)
    grids = grids if given.get("job", [ROWS]) == [ROWS] else ()
    asked = given.get("method")
    found: list[dict[str, list[str]]] = []
    rest = list(asked or [])
    for grid in grids:
        own = _axes([f"{key}={value}" for key, value in grid.items()], loader)
        methods = [name for name in asked or own["method"] if name in own["method"]]
        rest = [name for name in rest if name not in own["method"]]
        if methods:
            found.append({**own, **given, "method": methods})
    if rest or not grids:
        found.append({**given, **({"method": rest} if rest else {})})
    return [list(point) for axes in found for point in itertools.product(*axes.values())]


def _axes(overrides: Sequence[str], loader: ConfigLoader | None) -> dict[str, list[str]]:
    """Return key -> one override a value."""
    axes: dict[str, list[str]] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides([*overrides]):
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError(
                    f"{override.input_line} is not a list of values; "
                    f"write {key}=VALUE,VALUE or {key}=range(FROM,TO,STEP)"
                )
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            assert override.input_line is not None
            axes[key] = [override.input_line]
    return axes
