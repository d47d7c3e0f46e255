"""The sweepers of `python run.py -m`: each cell of a grid once, unfinished cells only.

Here and not in `harness`, because Hydra takes plugins from the package of this name alone.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.cell import ELSEWHERE, Cell
from harness.jobs import refuse
from harness.kinds import Kind, Planned, for_elsewhere, kinds_of
from harness.known import Known
from harness.plan import defer
from harness.planning import plan_cell
from harness.progress import ended_line
from harness.sweep import plan_cells
from kernels.errors import ConfigError

ROWS = "job=cell"
MULTIRUN = "hydra.mode=MULTIRUN"

SWEEP = "sweep"
"""Where the grids of `+sweep=NAME` stand in the configuration."""

FIXED, NEEDS = "fixed", "needs"
"""What a grid may say beside axes: those that the command line leaves alone, and the modules
without which it is left out."""

WORKERS = "hydra_plugins.quantbench_joblib.WorkersLauncher"
"""What hydra/launcher=joblib is here; its options are those of Hydra's own plugin."""

TURN = 50
"""Cells of one launch of Hydra's basic launcher."""

Cells = dict[str, tuple[Cell, list[str]]]
"""Cell id -> the cell and the overrides that make it."""


class GridSweeper(Sweeper):
    """Runs the product of all swept values, each cell once.

    It composes every point, drops those that are the same cell (an unquantized method has no
    bits), refuses the sweep where a value cannot work, puts baselines first, and hands unfinished
    cells to whichever launcher is configured.

    Args:
        grids: the default: several grids by name, each Hydra overrides by key; see `points`. Those
            of `+sweep=NAME` (`conf/sweep/`) take their place, all of them.
    """

    def __init__(self, grids: DictConfig | None) -> None:
        self.grids = grids
        self.loader: ConfigLoader | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives a sweeper."""
        self.loader = hydra_context.config_loader
        self.config = config
        self.context, self.task = hydra_context, task_function
        self.launcher = self._launcher({})

    def _launcher(self, options: Mapping[str, Any]) -> Launcher:
        """Return the launcher in use, with `options` in the place of its own."""
        assert self.config is not None
        config = self.config
        own = {"_target_": WORKERS} if self._launchers_name() == "joblib" else {}
        if own or options:
            config = config.copy()
            with open_dict(config):
                config.hydra.launcher.update({**options, **own})
        return Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=self.task, config=config
        )

    def _launchers_name(self) -> str:
        assert self.config is not None
        return str(self.config.hydra.runtime.choices["hydra/launcher"])

    def sweep(self, arguments: list[str]) -> Any:
        """Run every missing cell of the grid that `arguments` describe."""
        assert self.config is not None
        own = OmegaConf.select(self.config, SWEEP)
        with _ending_in_a_sentence():
            grids = usable(self.grids if own is None else own)
            axes = without(arguments, SWEEP)
            if own is not None:
                # The mode came from the sweep's file, which points leave out.
                axes.append(MULTIRUN)
            return self._launch(self._cells(points(grids, axes, self.loader)))

    def _launch(self, cells: Cells) -> Any:
        """Run those of `cells` that are not there.

        Raises:
            ConfigError: one cannot work.
        """
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir).absolute()
        remote = isinstance(self.launcher, Queue)
        if remote:
            planned = for_elsewhere(list(cells.values()))
            cells = {cell.id: (cell, point) for cell, point in planned}
        self._kinds(list(cells.values()))
        missing = plan_cells([cell for cell, _ in cells.values()], folder, remote)
        there = len(cells) - len(missing)
        print(f"{len(cells)} cells, {there} of them there already", flush=True)
        elsewhere = self._run([cells[cell.id] for cell in missing])
        if elsewhere:
            names = ", ".join(cell.title for cell, _ in elsewhere[:3])
            more = f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else ""
            print(f"waiting for what other sweeps run: {names}{more}", flush=True)
            defer(folder, [cell.id for cell, _ in elsewhere])
            self._run(elsewhere)
        return []

    def _kinds(self, cells: list[Planned]) -> list[Kind]:
        assert self.config is not None
        options = {str(key) for key in self.config.hydra.launcher} - {"_target_"}
        return kinds_of(cells, self._launchers_name(), options)

    def _run(self, cells: list[Planned]) -> list[Planned]:
        """Hand `cells` to the launcher, a launch a kind; return those that other sweeps run."""
        launches = [
            (launcher, some)
            for kind in self._kinds(cells)
            for launcher in [self._launcher(kind.options)]
            for some in self._turns(kind.cells)
        ]
        queues = [(queue, some) for queue, some in launches if isinstance(queue, Queue)]
        if queues:
            return wait_for(queues)
        elsewhere: list[Planned] = []
        first = 0
        for launcher, some in launches:
            try:
                ended = launcher.launch([point for _, point in some], initial_job_idx=first)
            except BrokenProcessPool:
                # Of joblib's launcher, which then says of no cell how it ended: the report does.
                print(
                    "error: a process of the launcher was ended from outside, and with it the "
                    "sweep; finished cells are kept, the same command goes on with the rest",
                    file=sys.stderr,
                )
                return []
            first += len(some)
            elsewhere += [
                cell for cell, job in zip(some, ended, strict=True) if job.return_value == ELSEWHERE
            ]
        return elsewhere

    def _turns(self, cells: list[Planned]) -> list[list[Planned]]:
        """Return `cells` as so many launches as keep the driver small.

        Hydra's basic launcher, which runs one cell after the other, keeps the configurations of
        each (a quarter of a MiB) until its last has ended. Others are given all cells at once.
        """
        if self._launchers_name() != "basic":
            return [cells]
        return [cells[start : start + TURN] for start in range(0, len(cells), TURN)]

    def _cells(self, points: list[list[str]]) -> Cells:
        """Compose every point; the first of several equal cells stands, baselines come first."""
        assert self.loader is not None
        assert self.config is not None
        cells: Cells = {}
        known = Known()
        for point in points:
            composed = self.loader.load_sweep_config(self.config, point)
            if composed.job.name == "deploy":
                raise ConfigError(
                    "job=deploy decides on one configuration; run it without -m, once a profile"
                )
            cell = plan_cell(composed, point, known)
            cells.setdefault(cell.id, (cell, point))
        ordered = sorted(
            cells.items(), key=lambda item: item[1][0].artefact_key != item[1][0].baseline_key
        )
        return dict(ordered)


@runtime_checkable
class Queue(Protocol):
    """A launcher whose jobs run on other machines, several launches at once."""

    def submit(self, points: Sequence[Sequence[str]], first: int) -> list[Any]:
        """Hand `points` over and return a job for each; `first` is the number of the first."""
        ...

    def ended(self, jobs: Sequence[Any]) -> Iterator[tuple[int, JobReturn]]:
        """Yield the place of each of `jobs` and what it returned, as they end."""
        ...

    def notice(self, jobs: Sequence[Any]) -> str:
        """Say what was submitted, where it writes and how it is stopped."""
        ...

    def cancel(self, jobs: Sequence[Any]) -> None:
        """Take `jobs` out of the queue."""
        ...


def wait_for(queues: Sequence[tuple[Queue, list[Planned]]]) -> list[Planned]:
    """Submit all cells, say how each ended; return those that other sweeps run.

    Raises:
        ConfigError: the cluster refuses some; none is left in the queue.
    """
    jobs: list[Any] = []
    queue, _ = queues[0]
    for launcher, cells in queues:
        try:
            jobs += launcher.submit([point for _, point in cells], len(jobs))
        except ConfigError:
            queue.cancel(jobs)
            raise
    print(queue.notice(jobs), flush=True)
    planned = [cell for _, cells in queues for cell in cells]
    elsewhere: list[Planned] = []
    start = time.monotonic()
    for number, (place, job) in enumerate(queue.ended(jobs), start=1):
        if job.status is JobStatus.COMPLETED:
            result = str(job.return_value)
        else:
            result = f"failed: {job._return_value}"  # the property prints and raises
        if result == ELSEWHERE:
            elsewhere.append(planned[place])
        seconds = time.monotonic() - start
        print(ended_line(planned[place][0].title, number, len(jobs), result, seconds), flush=True)
    return elsewhere


@contextmanager
def _ending_in_a_sentence() -> Iterator[None]:
    """Refuse what is a mistake of the user's; let an interrupt be one, whatever became of it."""
    try:
        yield
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from error
        if not isinstance(error, ConfigError):
            raise
        refuse(error)


def _interrupted(error: BaseException | None) -> bool:
    """Whether `error` comes of an interrupt, as where OmegaConf was building a node."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


class SearchSweeper(GridSweeper):
    """Looks for the best cell of the axes instead of running all of them: `conf/search/`."""

    def sweep(self, arguments: list[str]) -> Any:
        """Race the cells of the search's axes; those given in `arguments` take their place."""
        assert self.config is not None
        from harness.racing import Racing

        with _ending_in_a_sentence():
            try:
                if OmegaConf.select(self.config, SWEEP) is not None:
                    raise ConfigError("+sweep and +search are two ways to choose cells; give one")
                search = instantiate(self.config.search)
                own = _axes([f"{key}={value}" for key, value in search.axes.items()], self.loader)
                # The mode came from the search's file, which points leave out.
                asked = _axes([*without(arguments, "search"), MULTIRUN], self.loader)
                asked.setdefault("suite", [f"suite={self.config.hydra.runtime.choices['suite']}"])
                Racing(search, {**own, **asked}, self._cells, self._launch).run(
                    self.config, arguments
                )
            except InstantiationException as error:
                reason = str(error.__cause__ or error).splitlines()[0]
                raise ConfigError(reason) from error


def usable(grids: DictConfig | None) -> list[dict[str, Any]]:
    """Return those of the `grids` by name whose `needs` are installed; of others a note is printed.

    Raises:
        ConfigError: a grid is no mapping, or an axis of it no text or number.
    """
    found: Any = OmegaConf.to_container(grids, resolve=True) if grids is not None else {}
    if not isinstance(found, dict):
        raise ConfigError("a sweep is a mapping of grids by name, each with Hydra overrides by key")
    kept = []
    for name, grid in found.items():
        _check_grid(name, grid)
        needed = [module.strip() for module in str(grid.pop(NEEDS, "")).split(",")]
        missing = [m for m in needed if m and find_spec(m.partition(".")[0]) is None]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            print(
                f"note: grid {name} is left out: {' and '.join(missing)} {verb} not installed here",
                flush=True,
            )
        else:
            kept.append(grid)
    return kept


def _check_grid(name: Any, grid: Any) -> None:
    fixed = grid.get(FIXED, {}) if isinstance(grid, dict) else None
    if not isinstance(fixed, dict):
        raise ConfigError(
            f"grid {name} must have Hydra overrides by key, as method: rtn and bits: 4,3, and "
            f"under {FIXED}, if there, the same"
        )
    for key, value in {**grid, **fixed}.items():
        if key != FIXED and isinstance(value, list | dict):
            raise ConfigError(
                f"grid {name} has {key}: {value}; the values of an axis are written with commas, "
                f"as {key}: VALUE,VALUE"
            )


def without(arguments: Sequence[str], node: str) -> list[str]:
    """Return the `arguments` that are not about `node`, which is no part of a cell.

    Raises:
        ConfigError: one gives `node` several values, which Hydra would take for an axis and drop.
    """
    about = re.compile(rf"[+~]*{re.escape(node)}([.=@]|$)")
    own = [argument for argument in arguments if about.match(argument)]
    for override in OverridesParser.create().parse_overrides(own):
        if override.is_sweep_override():
            key, _, values = str(override.input_line).partition("=")
            raise ConfigError(
                f"{override.input_line} is no axis of a cell; as one value it is written in two "
                f"pairs of quotes: '{key}=\"{values}\"'"
            )
    return [argument for argument in arguments if argument not in own]


def points(
    grids: Sequence[Mapping[str, Any]], arguments: Sequence[str], loader: ConfigLoader | None
) -> list[list[str]]:
    """Return the overrides of every point of the `grids` under the command line's.

    Each grid is the product of its own axes; an axis given in `arguments` takes its place in every
    grid but those that have it under `fixed`, and with it what is below it: a grid with a fixed
    `model` hears of no `model.path`. Methods given there choose the grids: each runs with the axes
    of those that name it, one that none names with what was given alone. The grids are those of
    rows: another job has none.

    Raises:
        ConfigError: an axis is no list of values.
    """
    given = _axes(arguments, loader)
    grids = grids if given.get("job", [ROWS]) == [ROWS] else ()
    asked = given.get("method")
    found: list[dict[str, list[str]]] = []
    rest = list(asked or [])
    for grid in grids:
        fixed = grid.get(FIXED, {})
        free = {key: value for key, value in grid.items() if key != FIXED}
        own = _axes([f"{key}={value}" for key, value in {**fixed, **free}.items()], loader)
        taken = {key: values for key, values in given.items() if not _is_below(key, fixed)}
        if "method" not in own:
            found.append({**own, **taken})
            continue
        methods = [name for name in asked or own["method"] if name in own["method"]]
        rest = [name for name in rest if name not in own["method"]]
        if methods:
            found.append({**own, **taken, "method": methods})
    if rest or not grids:
        found.append({**given, **({"method": rest} if rest else {})})
    return [list(point) for axes in found for point in itertools.product(*axes.values())]


def _is_below(key: str, fixed: Mapping[str, Any]) -> bool:
    """Whether `key` is one of `fixed`, or an option of it."""
    name = key.lstrip("+~")
    return any(name == own or name.startswith((f"{own}.", f"{own}@")) for own in fixed)


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
