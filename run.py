"""Entry of quantbench.

One call is one cell; `-m` is a grid. Free of torch: the work is done in child processes.
"""

from __future__ import annotations

import sys

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(config: DictConfig) -> str | tuple[float, ...]:
    """Do what `job` says with one composed configuration; returns what the job returns."""
    result: str | tuple[float, ...] = instantiate(config.job, _recursive_=False).run(config)
    return result


def main() -> None:
    """Entry of the command line."""
    try:
        run()
    except KeyboardInterrupt:
        sys.exit("interrupted; finished cells are kept, the same command goes on with the rest")


if __name__ == "__main__":
    main()
