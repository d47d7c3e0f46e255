"""What the children of tests/harness/test_launch.py do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from harness.launch import Stage
from harness.memory import peak_bytes
from kernels.errors import ConfigError


def fine(job: dict[str, Any], stage: Stage) -> None:
    stage("writing")
    Path(job["file"]).write_text(f"{os.environ.get('QUANTBENCH_TEST')} {torch.get_num_threads()}")


def config_error(job: dict[str, Any], stage: Stage) -> None:
    raise ConfigError("bits is 5; it must be 8, 4, 3 or 2")


def error(job: dict[str, Any], stage: Stage) -> None:
    raise RuntimeError("something\nbroke")


def killed(job: dict[str, Any], stage: Stage) -> None:
    print("about to die", flush=True)
    os.kill(os.getpid(), getattr(signal, job["signal"]))


def leaves(job: dict[str, Any], stage: Stage) -> None:
    print("goodbye", file=sys.stderr, flush=True)
    os._exit(7)


def hangs(job: dict[str, Any], stage: Stage) -> None:
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(job["file"]).write_text(str(grandchild.pid))
    time.sleep(60)


def allocates(job: dict[str, Any], stage: Stage) -> None:
    blocks = []
    for _ in range(job["mebibytes"]):
        blocks.append(torch.ones(2**18))
        time.sleep(0.001)
    taken = peak_bytes() - job["resident_at_start"]
    Path(job["file"]).write_text(str(taken))


def tells(job: dict[str, Any], stage: Stage) -> None:
    """Quote a key on every way out: Python's output, the bare descriptor, the exception."""
    key = os.environ["QUANTBENCH_TEST_TOKEN"]
    print("printed", key, flush=True)
    os.write(2, f"written {key}\n".encode())
    if job["dies"]:
        os._exit(7)
    raise RuntimeError(f"refused with {key} at https://me:{key}@hub.example/model")
