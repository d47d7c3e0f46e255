"""A Slurm cluster of two nodes on one machine, for tests: Debian's daemons in their own folder.

    python -m tests.slurm.cluster up FOLDER      prints what leads Slurm's commands to it
    python -m tests.slurm.cluster down FOLDER

Nothing outside FOLDER is written: munge has a key and a socket of its own, and SLURM_CONF leads
daemons and commands to the configuration there. The daemons run as the user who calls, so only
that user can submit. There are no cgroups (`proctrack/linuxproc`, `task/none`), hence no limits on
what a job takes, and no accounting. Missing packages are installed with apt where root runs this.
"""

from __future__ import annotations

import argparse
import getpass
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("n1", "n2")
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")
PACKAGES = ("slurm-wlm", "munge")
SBIN = "/usr/sbin:/sbin"
INSTALL_SECONDS = 240
START_SECONDS = 60
STOP_SECONDS = 15
DOWN_SECONDS = 8
"""After which the controller takes a silent node for dead and queues its jobs again."""

CONFIGURATION = """\
ClusterName=quantbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout={down}
KillWait=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus}\n"
PARTITION = "PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP\n"


class ClusterError(RuntimeError):
    """There can be no cluster here; the sentence says why."""


@dataclass(frozen=True)
class Cluster:
    """The cluster whose files are in `folder`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Slurm's commands find it."""
        path = f"{os.environ.get('PATH', '')}:{SBIN}"
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def start(self, cpus: int = 1) -> None:
        """Start the daemons, each node with `cpus` processors, and wait until both nodes are idle.

        Raises:
            ClusterError: a daemon does not start.
        """
        for name in ("", "state", *NODES):
            (self.folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        self._configure(cpus)
        self._munge()
        self._run("slurmctld")
        for node in NODES:
            self._run("slurmd", "-N", node)
        deadline = time.monotonic() + START_SECONDS
        while self.states() != dict.fromkeys(NODES, "idle"):
            if time.monotonic() > deadline:
                raise ClusterError(f"the nodes are not idle but {self.states()}: {self._logs()}")
            time.sleep(0.1)

    def _configure(self, cpus: int) -> None:
        host = platform.node().partition(".")[0]
        ports = _free_ports(1 + len(NODES))
        text = CONFIGURATION.format(
            host=host, ports=ports, user=getpass.getuser(), folder=self.folder, down=DOWN_SECONDS
        )
        for name, port in zip(NODES, ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=cpus)
        (self.folder / "slurm.conf").write_text(text + PARTITION.format(names=",".join(NODES)))

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        # Forced, since it wants the folders above its socket open to everybody.
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid"}
        files |= {"log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{suffix}" for name, suffix in files.items()]
        self._run("munged", "--force", *options)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        if done.returncode != 0:
            raise ClusterError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """Return the state of each node, as `sinfo` names it."""
        with suppress(ClusterError):
            lines = self._run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
            return dict(line.split() for line in lines)
        return {}

    def jobs_on(self, node: str) -> list[str]:
        """Return the jobs that run on `node`."""
        return self._run(
            "squeue", "--noheader", "--array", f"--nodelist={node}", "--states=R", "--format=%i"
        ).split()

    def hurry(self) -> bool:
        """Let jobs that are queued again start now, and say whether there were any.

        Slurm gives a node two minutes to clean up after a job before it starts the job again.
        """
        queued = self._run("squeue", "--noheader", "--array", "--states=PD", "--format=%i %r")
        jobs = [line.split()[0] for line in queued.splitlines() if line.endswith("BeginTime")]
        for job in jobs:
            self._run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return bool(jobs)

    def _logs(self) -> str:
        logs = [self.folder / name for name in ("slurmctld.log", "n1.log", "n2.log")]
        lines = [log.read_text().splitlines()[-1:] for log in logs if log.exists()]
        return " | ".join(line for last in lines for line in last)

    @contextmanager
    def suspended(self, node: str) -> Iterator[list[psutil.Process]]:
        """Have the processes of the jobs of `node` stand still while the block runs."""
        stopped: list[psutil.Process] = []
        try:
            # Until no process was started while the others were stopped.
            while found := [one for one in self._of_jobs(node) if one not in stopped]:
                for process in found:
                    with suppress(psutil.NoSuchProcess):
                        process.suspend()
                stopped += found
            yield stopped
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def kill_node(self, node: str) -> list[int]:
        """End a node as a power cut does, with what its jobs run; return the processes."""
        daemon = _process(self.folder / f"{node}.pid")
        found = [daemon] if daemon is not None else []
        found += self._steps(node)
        found += self._of_jobs(node)
        _kill(found)
        return [process.pid for process in found]

    def _steps(self, *nodes: str) -> list[psutil.Process]:
        """Return the daemons of the jobs of `nodes`, which listen in the nodes' folders."""
        return [
            process
            for process in psutil.process_iter()
            if process.name().startswith("slurmstepd")
            and any(
                place.startswith(f"{self.folder / node}/")
                for place in _sockets(process)
                for node in nodes
            )
        ]

    def _of_jobs(self, *nodes: str) -> list[psutil.Process]:
        """Return the processes of the jobs of `nodes`, which Slurm's variables tell from others."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                variables = process.environ()
                here = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if here and variables.get("SLURMD_NODENAME") in nodes:
                    found.append(process)
        return found

    def stop(self) -> None:
        """End all daemons and jobs, in whatever state they are."""
        files = [f"{node}.pid" for node in NODES] + ["slurmctld.pid", "munge.pid"]
        daemons = [found for file in files if (found := _process(self.folder / file)) is not None]
        jobs = self._steps(*NODES) + self._of_jobs(*NODES)
        for process in daemons:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _kill(jobs)
        _, alive = psutil.wait_procs(daemons, timeout=STOP_SECONDS)
        # What a daemon started while it was being ended counts, too.
        _kill([*alive, *self._steps(*NODES), *self._of_jobs(*NODES)])


def install() -> None:
    """Make sure that Slurm and munge are here.

    Raises:
        ClusterError: they are not, and cannot be installed.
    """
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    missing = [name for name in COMMANDS if shutil.which(name, path=path) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(f"{missing[0]} is missing, and only root can install it, with apt")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(
                ["apt-get", "--quiet", *command],
                env=environment,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"apt-get {command[0]} took over {INSTALL_SECONDS} s") from None
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:]
            raise ClusterError(f"apt-get {command[0]} failed: {' '.join(last)}")


@contextmanager
def running(folder: Path, cpus: int = 1) -> Iterator[Cluster]:
    """Have a cluster in `folder` while the block runs.

    Raises:
        ClusterError: there can be none here.
    """
    install()
    cluster = Cluster(folder)
    try:
        cluster.start(cpus)
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _process(file: Path) -> psutil.Process | None:
    try:
        return psutil.Process(int(file.read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def _sockets(process: psutil.Process) -> list[str]:
    try:
        return [str(one.laddr) for one in process.net_connections(kind="unix")]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=["up", "down"])
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    cluster = Cluster(asked.folder.absolute())
    if asked.what == "down":
        cluster.stop()
        return
    try:
        install()
        cluster.start()
    except ClusterError as error:
        cluster.stop()
        sys.exit(f"error: {error}")
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")


if __name__ == "__main__":
    main()
