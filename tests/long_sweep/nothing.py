"""An application of Hydra's that does nothing with the project's configuration: Hydra's own cost.

`python -m tests.long_sweep.nothing -m hydra/sweeper=basic ...` composes and launches each job as
Hydra's basic sweeper does, and prints nothing.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(config: DictConfig) -> None:
    """Do nothing."""


if __name__ == "__main__":
    main()
