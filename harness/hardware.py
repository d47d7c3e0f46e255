"""The machine of a cell: what may be used of it, and what it is.

No torch at import: the driver reads this too.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from kernels.errors import ConfigError

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "lm_eval",
    "numpy",
    "accelerate",
    "auto_round",
    "bitsandbytes",
    "compressed_tensors",
    "gguf",
    "gptqmodel",
    "hqq",
    "llama_cpp_python",
    "llmcompressor",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torchao",
    "quantbench",
)


@dataclass(frozen=True)
class Hardware:
    """Where a cell runs and what it may take.

    Attributes:
        name: as tables show it.
        device: `cpu` or `cuda`.
        compute_dtype: floating type of activations and of everything left unquantized.
        threads: CPU threads; None takes what the machine gives this process.
        memory_limit_bytes: most memory a child of the cell may take beyond what it starts with;
            None is 90 % of what is free when the cell starts.
        time_limit_seconds: longest a child of the cell may run.
        environment: variables set in the cell's processes.
        gpu_layers: decoder blocks that llama.cpp puts on the card, with device `cuda`; None: all.
        allow_fallback: whether a matrix whose kernel refuses may be dequantized at each call.
        offload: keep decoder blocks in main memory (`cpu`, with device `cuda`) or on `disk` and
            bring them to the device for each call; None: the whole model is on the device.
        resident_bytes: most bytes of decoder blocks that stay on the device with `offload`.
        decode: `auto`: tokens are decoded by the fastest code that knows the model; `model`: by
            transformers, to compare with.
        machine: processor and card, as `machine_name` gives them, of the machine that the cell is
            measured on, which has to be that one; None: of the machine that plans the cell.
        launch: options of a launcher for cells on this hardware, by the launcher's name.
    """

    name: str
    device: str
    compute_dtype: str = "float32"
    threads: int | None = None
    gpu_layers: int | None = None
    memory_limit_bytes: int | None = None
    time_limit_seconds: float = 3600.0
    environment: Mapping[str, str] = field(default_factory=dict)
    allow_fallback: bool = True
    offload: str | None = None
    resident_bytes: int = 0
    decode: str = "auto"
    machine: str | None = None
    launch: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_launch(self.launch)
        places = ("cpu", "disk") if self.device == "cuda" else ("disk",)
        if self.offload is not None and self.offload not in places:
            raise ConfigError(
                f"hardware.offload is {self.offload!r} with device {self.device}; it must be null "
                f"or {' or '.join(places)}"
            )
        if self.resident_bytes < 0:
            raise ConfigError(
                f"hardware.resident_bytes is {self.resident_bytes}; it must be 0 or more"
            )
        if self.resident_bytes and self.offload is None:
            raise ConfigError(
                f"hardware.resident_bytes is {self.resident_bytes}, which says what stays on the "
                "device where blocks are offloaded; with it set hardware.offload"
            )
        if self.decode not in ("auto", "model"):
            raise ConfigError(f"hardware.decode is {self.decode!r}; it must be 'auto' or 'model'")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"hardware.device is {self.device!r}; it must be 'cpu' or 'cuda'")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(
                f"hardware.compute_dtype is {self.compute_dtype!r}; "
                f"it must be one of {', '.join(COMPUTE_DTYPES)}"
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"hardware.threads is {self.threads}; it must be 1 or more, or null")
        if self.gpu_layers is not None and (self.gpu_layers < 0 or self.device == "cpu"):
            raise ConfigError(
                f"hardware.gpu_layers is {self.gpu_layers} with device {self.device}; it must be 0 "
                "or more with device cuda, or null"
            )
        if self.time_limit_seconds <= 0:
            raise ConfigError("hardware.time_limit_seconds must be above 0")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes <= 0:
            raise ConfigError("hardware.memory_limit_bytes must be above 0, or null")

    @property
    def usable_threads(self) -> int:
        """CPU threads a child of the cell uses."""
        return self.threads or len(os.sched_getaffinity(0))


def _check_launch(launch: Mapping[str, Any]) -> None:
    for launcher, options in launch.items():
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"hardware.launch.{launcher} is {options!r}; it must be options by name, as "
                "{partition: gpu}"
            )


def describe(hardware: Hardware) -> dict[str, Any]:
    """Return the facts of this machine that a figure depends on (bytes, counts, versions)."""
    facts: dict[str, Any] = {
        "hardware": hardware.name,
        "device": hardware.device,
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": hardware.usable_threads,
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "gpu": None,
    }
    if hardware.device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
    return facts


def machine_name(device: str) -> str:
    """Return processor and, for `cuda`, card of this machine: what a speed belongs to.

    Read from /proc, so that the driver needs neither torch nor a CUDA context.
    """
    if device == "cpu":
        return _cpu_name()
    models = [
        line.partition(":")[2].strip()
        for card in _cards()[:1]
        for line in card.read_text().splitlines()
        if line.startswith("Model")
    ]
    return " + ".join([_cpu_name(), *models])


def has_card() -> bool:
    """Whether there is a CUDA card in this machine, visible or not."""
    return bool(_cards())


def other_machine(hardware: Hardware) -> str | None:
    """Return what is wrong where `hardware` names another machine than this one, else None."""
    here = machine_name(hardware.device)
    if hardware.machine in (None, here):
        return None
    return (
        f"the cell was planned for the machine {hardware.machine!r}, and this one "
        f"({platform.node()}) is {here!r}; let the launcher choose machines of the one kind, or "
        "give hardware.machine as this one is"
    )


def _cards() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))


@cache
def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages a result depends on."""
    found = {}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
