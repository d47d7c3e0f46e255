"""A signal ends a run with its sentence and status, also where a library makes an error of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STRUCK = """
import os, runpy, signal, sys
from hydra._internal.config_loader_impl import ConfigLoaderImpl

place = int(sys.argv.pop(1))
composed = []
load = ConfigLoaderImpl.load_sweep_config

def struck(*given):
    composed.append(given)
    if len(composed) == place:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            None.flags  # as OmegaConf, which was building a node
    return load(*given)

ConfigLoaderImpl.load_sweep_config = struck
sys.argv[0] = "run.py"
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.parametrize("composed", [1, 3], ids=["planning", "running"])
def test_a_signal_within_hydra_stops_the_run(tmp_path: Path, composed: int) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", STRUCK, str(composed)),
            *("-m", "model=gpt2", "suite=size_only", "method=fp16,rtn", "bits=4"),
            *("group_size=128", f"runs_dir={tmp_path}"),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == (
        "interrupted; finished cells are kept, the same command goes on with the rest\n"
    )
