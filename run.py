"""Entry of quantbench.

One call is one cell; `-m` is a grid. Free of torch: the work is done in child processes.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from omegaconf import DictConfig

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_SIGNAL = 128
"""And the signal's number: the exit status of a run that was stopped, as shells count."""

stopped: list[int] = []
"""The number of the signal that asked this process to stop, once one has."""


def run(config: DictConfig) -> str | tuple[float, ...]:
    """Do what `job` says with one composed configuration; returns what the job returns."""
    from hydra.utils import instantiate

    if stopped:
        # A library took the exception for an error of its own.
        raise KeyboardInterrupt(*stopped)
    result: str | tuple[float, ...] = instantiate(config.job, _recursive_=False).run(config)
    return result


def main() -> None:
    """Entry of the command line."""
    for number in STOPS:
        # What whoever started this run told to be ignored (nohup) stays so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        # A second of imports, in which a run can be stopped as well.
        import hydra

        hydra.main(version_base="1.3", config_path="conf", config_name="config")(run)()
    except (KeyboardInterrupt, SystemExit):
        if not stopped:
            raise
        print(
            "interrupted; finished cells are kept, the same command goes on with the rest",
            file=sys.stderr,
        )
        sys.exit(EXIT_SIGNAL + stopped[0])


def _stop(number: int, frame: FrameType | None) -> None:
    """Let everything clean up behind itself; a second signal does not wait for that."""
    for other in STOPS:
        signal.signal(other, _leave)
    stopped.append(number)
    raise KeyboardInterrupt(number)


def _leave(number: int, frame: FrameType | None) -> None:
    # Children end with this process, and the next run removes what is left behind.
    os._exit(EXIT_SIGNAL + number)


if __name__ == "__main__":
    main()
