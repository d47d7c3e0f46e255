"""The sweeper of `hydra/sweeper=objectives`: Hydra's Optuna plugin over cells.

The plugin asks Optuna for points and tells it what jobs return. Here that is figures of records
(`job.objectives`), several at once where wanted; a trial that fails is one point less and not the
end of the search, and the best trials are printed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from harness.jobs import refuse
from harness.plan import FILE_NAME
from kernels.errors import ConfigError

PLUGIN = "hydra_plugins.hydra_optuna_sweeper"
RESULTS = "optimization_results.yaml"
DIRECTIONS = ("minimize", "maximize")


class ObjectivesSweeper(Sweeper):
    """Runs the cells that Optuna asks for, and prints those that no other is better than.

    Args:
        direction: `minimize` or `maximize`, of all objectives or a list with one of each.
        n_trials: points to try.
        n_jobs: trials handed to the launcher at once.
        storage: URL of Optuna's storage; None keeps the study in memory.
        study_name: of a kept study.
        sampler: node of Optuna's sampler.
        params: axes as Hydra overrides by key, under those of the command line.
    """

    def __init__(
        self,
        direction: str | ListConfig,
        n_trials: int,
        n_jobs: int,
        storage: str | None,
        study_name: str | None,
        sampler: DictConfig,
        params: DictConfig,
    ) -> None:
        self.direction, self.params, self.sampler = direction, params, sampler
        self.trials, self.jobs = n_trials, n_jobs
        self.storage, self.study_name = storage, study_name
        self.config: DictConfig | None = None
        self.plugin: Any = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives a sweeper, and build the plugin's.

        What cannot work ends the command with one sentence.
        """
        self.config = config
        try:
            self.objectives = _objectives(config)
            self.directions = _directions(self.direction, self.objectives)
            if find_spec(PLUGIN) is None:
                raise ConfigError(
                    "hydra/sweeper=objectives needs a plugin that is not installed: "
                    "pip install hydra-optuna-sweeper"
                )
            if self.trials < 1 or self.jobs < 1:
                raise ConfigError(
                    f"hydra.sweeper.n_trials is {self.trials} and n_jobs {self.jobs}; both must be "
                    "1 or more"
                )
            self.plugin = self._plugin()
        except ConfigError as error:
            refuse(error)
        self.plugin.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def _plugin(self) -> Any:
        """Return Hydra's Optuna sweeper with this one's options."""
        import optuna
        from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

        # Its notices of trials and studies say what the progress lines say.
        optuna.logging.set_verbosity(logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        return OptunaSweeper(
            sampler=instantiate(self.sampler),
            direction=list(self.directions) if len(self.directions) > 1 else self.directions[0],
            storage=self.storage,
            study_name=self.study_name,
            n_trials=self.trials,
            n_jobs=self.jobs,
            # A trial that fails is one point less, not the end of the search.
            max_failure_rate=1.0,
            search_space=None,
            custom_search_space=None,
            params=self.params,
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the trials; prints the best, or says that none was finished."""
        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.plugin.sweep(arguments)
        except ValueError as error:
            # Of one objective the plugin asks for the best trial, and there may be none.
            if "No trials are completed" not in str(error):
                raise
        if not (folder / FILE_NAME).exists():
            refuse(ConfigError("no trial could be run; each is said above"))
        print(f"\n{self._text(folder)}", flush=True)
        return []

    def _text(self, folder: Path) -> str:
        """Return the best trials as lines."""
        path = folder / RESULTS
        found: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
        best = found.get("solutions", [])
        if "best_params" in found:
            best = [{"params": found["best_params"], "values": [found["best_value"]]}]
        if not best:
            return "no trial gave all objectives"
        lines = [
            f"{len(best)} of {self.trials} trials, than which none is better in all objectives:"
        ]
        pairs = list(zip(self.objectives, self.directions, strict=True))
        # Trials of equal points are one line.
        for trial in sorted(best, key=lambda one: list(map(float, one["values"]))):
            point = " ".join(f"{key}={value}" for key, value in trial["params"].items())
            figures = ", ".join(
                f"{name} {value:.6g} ({direction})"
                for (name, direction), value in zip(pairs, trial["values"], strict=True)
            )
            lines.append(f"  {point}: {figures}")
        return "\n".join(dict.fromkeys(lines))


def _objectives(config: DictConfig) -> list[str]:
    found = list(config.job.get("objectives") or [])
    if not found:
        raise ConfigError(
            "hydra/sweeper=objectives needs figures to look for: "
            "'job.objectives=[perplexity,artefact_bytes]' (metric, or metric/protocol)"
        )
    return [str(one) for one in found]


def _directions(given: str | ListConfig, objectives: Sequence[str]) -> list[str]:
    """Return one direction an objective."""
    found = [given] * len(objectives) if isinstance(given, str) else [str(one) for one in given]
    if len(found) != len(objectives) or not set(found) <= set(DIRECTIONS):
        raise ConfigError(
            f"hydra.sweeper.direction is {found} for {len(objectives)} objectives; it must be one "
            f"of {', '.join(DIRECTIONS)}, or a list with one of them for each"
        )
    return found
