"""The launcher of `hydra/launcher=slurm`: cells as jobs of a Slurm cluster with a shared folder.

Hydra's submitit plugin runs a cell within its job, submitit writes and submits the job scripts.
Unlike the plugin's own launcher, this one says of each cell how it ended as soon as it did, waits
for the others where a job died, and notices that from `squeue`, also on clusters without
accounting. What a job returns is read from a pickle that it leaves in the sweep's folder: only the
user may be able to write there.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from harness.jobs import refuse
from kernels.errors import ConfigError

PLUGIN = "hydra_plugins.hydra_submitit_launcher"
ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 1.0
QUEUE_SECONDS = 10.0
"""Between two looks at the queue, which all users of a cluster share."""
GRACE_SECONDS = 30.0
"""How long a job's result may take to arrive over a shared file system once the job has ended."""
SHARED = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout")
"""Options that submitit has for every cluster; others it wants as `slurm_<option>`."""
POSITIVE = ("timeout_min", "array_parallelism", "array_size", "signal_delay_s")
OWN = ("submitit_folder", "array_size", "max_num_timeout")
"""Options that do not describe a job."""


class SlurmLauncher(Launcher):
    """Hands out cells as arrays of Slurm jobs; its options are those of `slurm.yaml`."""

    # Hydra hands over every key of the launcher's node; submitit says which it does not know.
    def __init__(self, **options: Any) -> None:
        self.options: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True)
            if OmegaConf.is_config(value)
            else value
            for key, value in options.items()
        }
        self.job: Any = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives a launcher; what cannot work ends the command."""
        if find_spec(PLUGIN) is None:
            refuse(
                ConfigError(
                    "hydra/launcher=slurm needs a plugin that is not installed: "
                    "pip install hydra-submitit-launcher (the extra `slurm` of quantbench)"
                )
            )
        missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
        if missing:
            refuse(
                ConfigError(
                    f"hydra/launcher=slurm needs Slurm's {missing[0]}, which is not here; run the "
                    "command on a machine of the cluster, or leave the launcher out"
                )
            )
        try:
            _check(self.options)
            self._executor()
        except ConfigError as error:
            refuse(error)
        from hydra_plugins.hydra_submitit_launcher import submitit_launcher

        self.job = submitit_launcher.SlurmLauncher()
        self.job.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit the points and wait for all of them."""
        jobs = self.submit(job_overrides, initial_job_idx)
        ended = dict(self.ended(jobs))
        return [ended[place] for place in range(len(jobs))]

    def submit(self, points: Sequence[Sequence[str]], first: int) -> list[Any]:
        """Hand `points` to Slurm and return a job for each; `first` is the number of the first.

        Raises:
            ConfigError: Slurm refuses them.
        """
        jobs: list[Any] = []
        size = self.options["array_size"]
        for start in range(0, len(points), size):
            numbers = range(first + start, first + min(start + size, len(points)))
            calls = [
                (
                    list(points[number - first]),
                    "hydra.sweep.dir",
                    number,
                    str(number),
                    Singleton.get_state(),
                )
                for number in numbers
            ]
            try:
                jobs += self._executor().map_array(self.job, *zip(*calls, strict=True))
            except (ValueError, RuntimeError, subprocess.SubprocessError) as error:
                self.cancel(jobs)
                raise ConfigError(f"Slurm does not take the jobs: {_sentence(error)}") from error
        return jobs

    def _executor(self) -> Any:
        import submitit

        options = {key: value for key, value in self.options.items() if value is not None}
        executor = submitit.AutoExecutor(
            folder=options["submitit_folder"],
            cluster="slurm",
            slurm_max_num_timeout=options["max_num_timeout"],
        )
        # A job finds the project where the driver has it, also where it is not installed.
        path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
        setup = [path, *options.pop("setup", [])]
        named = {
            key if key in SHARED else f"slurm_{key}": value
            for key, value in options.items()
            if key not in OWN
        }
        try:
            executor.update_parameters(slurm_setup=setup, **named)
        except (AssertionError, ValueError, TypeError) as error:
            raise ConfigError(f"hydra.launcher cannot be as it is: {_sentence(error)}") from error
        return executor

    def ended(self, jobs: Sequence[Any]) -> Iterator[tuple[int, JobReturn]]:
        """Yield the place of each of `jobs` and what it returned, as they end.

        One that died has the status FAILED, and a sentence for what it raised.
        """
        waiting = dict(enumerate(jobs))
        queue = _Queue()
        while waiting:
            gone = queue.left(job.job_id for job in waiting.values())
            for place, job in list(waiting.items()):
                if job.paths.result_pickle.exists():
                    yield place, _returned(job)
                elif job.job_id in gone:
                    yield place, _failed(_death(job))
                else:
                    continue
                del waiting[place]
            if waiting:
                time.sleep(POLL_SECONDS)

    def notice(self, jobs: Sequence[Any]) -> str:
        """Say what was submitted, where it writes and how it is stopped."""
        logs = self.options["submitit_folder"].removesuffix("/%j")
        numbers = " ".join(_arrays(jobs))
        return (
            f"{len(jobs)} jobs in Slurm's queue, where they stay if this command is ended; "
            f"scancel {numbers} stops them; their logs: {logs}"
        )

    def cancel(self, jobs: Sequence[Any]) -> None:
        """Take `jobs` out of Slurm's queue again."""
        if jobs:
            _ask("scancel", *_arrays(jobs))


def _check(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that submitit would take and Slurm or this file would not."""
    for name in POSITIVE:
        value = options[name]
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"hydra.launcher.{name} is {value!r}; it must be 1 or more")
    setup = options["setup"]
    if not isinstance(setup, list) or not all(isinstance(line, str) for line in setup):
        raise ConfigError(
            f"hydra.launcher.setup is {setup!r}; it must be a list of shell commands, as "
            "[module load cuda]"
        )


# No dataclass: Hydra's scan for plugins runs a module before it is among `sys.modules`.
class _Queue:
    """What of the user's jobs Slurm still knows to wait or to run."""

    def __init__(self) -> None:
        self.looked = float("-inf")
        self.missed: dict[str, float] = {}

    def left(self, jobs: Iterable[str]) -> set[str]:
        """Return those of `jobs` that have been out of the queue for longer than a result takes."""
        now = time.monotonic()
        wanted = set(jobs)
        if now - self.looked > QUEUE_SECONDS:
            self.looked = now
            queued = _queued()
            gone = set() if queued is None else wanted - queued
            self.missed = {job: self.missed.get(job, now) for job in gone}
        return {job for job, since in self.missed.items() if now - since > GRACE_SECONDS} & wanted


def _queued() -> set[str] | None:
    """Return the user's jobs in the queue, each task of an array for itself; None: unknown."""
    answer = _ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i")
    return None if answer is None else set(answer.split())


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _arrays(jobs: Sequence[Any]) -> list[str]:
    """Return the numbers of the arrays that `jobs` are of, as `scancel` takes them."""
    return list(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))


def _returned(job: Any) -> JobReturn:
    """Return what `job` left; what went wrong around the cell is said in one sentence."""
    import submitit

    try:
        found: JobReturn = job.result()
    except (submitit.core.utils.UncompletedJobError, EOFError) as error:
        lines = [line for line in str(error).splitlines() if re.match(r"\w+(\.\w+)*: ", line)]
        said = lines[-1] if lines else _sentence(error)
        return _failed(f"its job {job.job_id} failed: {said}; {_where(job)}")
    if found.status is JobStatus.COMPLETED:
        return found
    raised = found._return_value  # the property prints and raises
    return _failed(
        f"its job {job.job_id} failed: {type(raised).__name__}: {_sentence(raised)}; {_where(job)}"
    )


def _death(job: Any) -> str:
    """Return how `job` ended that left no result."""
    facts = _ask("scontrol", "--oneliner", "show", "job", job.job_id) or ""
    state = re.search(r"\bJobState=(\S+)", facts)
    log = job.paths.stderr
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    end = f" ({state[1]})" if state else ""
    reason = f": {said[-1]}" if said else ""
    return f"its job {job.job_id} ended without a result{end}{reason}; {_where(job)}"


def _where(job: Any) -> str:
    return f"its log is {job.paths.stderr}"


def _failed(sentence: str) -> JobReturn:
    return JobReturn(status=JobStatus.FAILED, _return_value=RuntimeError(sentence))


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())
