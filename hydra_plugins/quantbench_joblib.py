"""The launcher of `hydra/launcher=joblib`: cells side by side on this machine.

Hydra's joblib plugin with workers that end with the command that started them, from their first
moment, and that leave a terminal's Ctrl-C, which the whole group of processes gets, to it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_joblib_launcher import joblib_launcher
from omegaconf import DictConfig

from harness.jobs import refuse
from harness.launch import end_with_parent
from kernels.errors import ConfigError


class WorkersLauncher(joblib_launcher.JoblibLauncher):  # type: ignore[misc]  # untyped
    """Runs cells in `n_jobs` processes; its options are those of Hydra's plugin."""

    # Hydra hands over every key of the launcher's node; joblib takes what it does not know itself
    # for its backend.
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, initializer=end_with_parent)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives a launcher; what cannot work ends the command."""
        if self.joblib["n_jobs"] == 0:
            refuse(
                ConfigError(
                    "hydra.launcher.n_jobs is 0; it must be 1 or more, or -1 for as many cells at "
                    "once as there are processors"
                )
            )
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the points and wait for all of them."""
        with _interrupts_for_this_process_alone():
            ended: Sequence[JobReturn] = super().launch(job_overrides, initial_job_idx)
        return ended


@contextmanager
def _interrupts_for_this_process_alone() -> Iterator[None]:
    """Let processes that are started in the block be deaf to Ctrl-C; this one hears it.

    They inherit what the thread that starts them blocks. Another thread takes the signal, and
    Python runs its handler in the main thread as ever.
    """
    over = threading.Event()
    threading.Thread(target=over.wait, name="interrupts", daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()
