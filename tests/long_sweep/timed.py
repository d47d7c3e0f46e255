"""`run.py` with a clock on what its sweep costs: Hydra's composing apart from all the rest.

`python -m tests.long_sweep.timed FILE ARGUMENTS...` runs `run.py ARGUMENTS...` in this process and
writes to FILE how often and for how long (seconds of the wall clock, and of the processor) Hydra
composed configurations, and how long the sweeper took in all, launched cells included.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins

RUN = Path(__file__).resolve().parent.parent.parent / "run.py"

Clock = dict[str, float]


def timed(call: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """Return `call` with its calls and seconds counted in `clock`."""
    clock.update(calls=0, wall=0.0, cpu=0.0)

    @functools.wraps(call)
    def wrapped(*given: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return call(*given, **named)
        finally:
            clock["calls"] += 1
            clock["wall"] += time.perf_counter() - wall
            clock["cpu"] += time.process_time() - cpu

    return wrapped


def main() -> None:
    """Run the command that follows the file's name."""
    found = Path(sys.argv.pop(1))
    sys.argv[0] = str(RUN)
    composed: Clock = {}
    swept: Clock = {}
    instantiate = Plugins.instantiate_sweeper

    def instantiate_timed(*given: Any, **named: Any) -> Any:
        sweeper = instantiate(*given, **named)
        # Hydra loads plug-ins anew, so their classes cannot be wrapped beforehand.
        sweeper.sweep = timed(sweeper.sweep, swept)  # type: ignore[method-assign]
        return sweeper

    wrapped = timed(ConfigLoaderImpl.load_sweep_config, composed)
    ConfigLoaderImpl.load_sweep_config = wrapped  # type: ignore[method-assign]
    Plugins.instantiate_sweeper = instantiate_timed  # type: ignore[method-assign]
    try:
        runpy.run_path(str(RUN), run_name="__main__")
    finally:
        found.write_text(json.dumps({"compose": composed, "sweep": swept}))


if __name__ == "__main__":
    main()
