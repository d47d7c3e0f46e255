"""The sweeper of `python run.py -m`: each cell of a grid once, unfinished cells only.

Here and not in `harness`, because Hydra takes plugins from the package of this name alone.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from harness.cell import Cell, plan_cell
from harness.sweep import EXIT_REFUSED, plan_cells
from kernels.errors import ConfigError


class GridSweeper(Sweeper):
    """Runs the product of all swept values, each cell once.

    It composes every point, drops those that are the same cell (an unquantized method has no
    bits), refuses the sweep where a value cannot work, puts baselines first, and hands unfinished
    cells to whichever launcher is configured.

    Args:
        params: the default grid, Hydra overrides by key; the command line comes on top.
    """

    def __init__(self, params: DictConfig | None) -> None:
        self.params = dict(params or {})
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
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir).absolute()
        try:
            cells = self._cells(self._points(arguments))
            missing = plan_cells([cell for cell, _ in cells.values()], folder)
        except ConfigError as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            raise SystemExit(EXIT_REFUSED) from None
        there = len(cells) - len(missing)
        print(f"{len(cells)} cells, {there} of them there already", flush=True)
        if not missing:
            return []
        return self.launcher.launch([cells[cell.id][1] for cell in missing], initial_job_idx=0)

    def _points(self, arguments: list[str]) -> list[list[str]]:
        """Return the overrides of every point: default grid, overruled by the command line."""
        assert self.loader is not None
        given = [f"{key}={value}" for key, value in self.params.items()] + arguments
        axes: dict[str, list[str]] = {}
        for override in OverridesParser.create(config_loader=self.loader).parse_overrides(given):
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
        return [list(point) for point in itertools.product(*axes.values())]

    def _cells(self, points: list[list[str]]) -> dict[str, tuple[Cell, list[str]]]:
        """Compose every point; the first of several equal cells stands, baselines come first."""
        assert self.loader is not None
        assert self.config is not None
        cells: dict[str, tuple[Cell, list[str]]] = {}
        for point in points:
            composed = self.loader.load_sweep_config(self.config, point)
            with_hydra = OmegaConf.masked_copy(composed, [k for k in composed if k != "hydra"])
            cell = plan_cell(with_hydra, point)
            cells.setdefault(cell.id, (cell, point))
        ordered = sorted(
            cells.items(), key=lambda item: item[1][0].artefact_key != item[1][0].baseline_key
        )
        return dict(ordered)
