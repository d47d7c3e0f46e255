"""The grid of the simulated sweep: made-up models x methods x bits x group sizes x seeds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

CONFIG = Path(__file__).resolve().parent / "conf"

METHODS, BITS, GROUP_SIZES = ("rtn", "gptq"), (8, 4, 3, 2), (16, 32, 64, 128, 256)
SCHEMES = len(METHODS) * len(BITS) * len(GROUP_SIZES)
CELLS_OF_A_MODEL = 1000


@dataclass(frozen=True)
class Grid:
    """How large a sweep is.

    Attributes:
        models: names in the place of the embedded model's.
        seeds: cells of one model and scheme.
    """

    models: int
    seeds: int

    @classmethod
    def of(cls, cells: int) -> Grid:
        """Return the grid of about `cells` cells, a thousand of each model."""
        models = max(1, round(cells / CELLS_OF_A_MODEL))
        return cls(models, max(1, round(cells / (models * SCHEMES))))

    @property
    def cells(self) -> int:
        """The exact number: each model has an unquantized cell, too."""
        return self.models * (SCHEMES * self.seeds + 1)

    @property
    def axes(self) -> dict[str, str]:
        """The axes of the quantized cells as Hydra overrides by key."""
        return {
            "method": ",".join(METHODS),
            "bits": ",".join(map(str, BITS)),
            "group_size": ",".join(map(str, GROUP_SIZES)),
            "seed": ",".join(map(str, range(self.seeds))),
            "model.name": ",".join(f"simulated_{number}" for number in range(self.models)),
        }

    def write_config(self, folder: Path) -> None:
        """Write the sweep `long` and the job `simulated` into the configuration `folder`."""
        models = self.axes["model.name"]
        # Rows stand apart: a report that merges repetitions has fewer of them.
        fixed = {"job": "simulated", "suite": "smoke", "repeat": "none"}
        grids = {
            "unquantized": {"fixed": fixed, "method": "fp32", "model.name": models},
            "quantized": {"fixed": fixed, **self.axes},
        }
        (folder / "sweep").mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create({"sweep": grids}))
        (folder / "sweep/long.yaml").write_text(f"# @package _global_\n{text}")
        shutil.copytree(CONFIG / "job", folder / "job", dirs_exist_ok=True)


def arguments(config: Path, runs_dir: Path) -> list[str]:
    """Return the arguments of `run.py` for the sweep whose configuration is in `config`."""
    return ["-m", f"--config-dir={config}", "+sweep=long", f"runs_dir={runs_dir}"]
