"""Child that instantiates everything a sweep will use, before any weight is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from harness.context import Checking
from harness.launch import Stage
from harness.load import describes_encoder, meta_model
from harness.models import ModelSource
from harness.record import write_atomically
from kernels.errors import ConfigError
from methods.base import ForeseeingMethod

ENCODER_METHODS = (
    "fp32, bf16, fp16, rtn, int8_dynamic, int8_static, onnx_fp32, onnx_fp16, onnx_int8_dynamic, "
    "onnx_int8_static"
)

UNKNOWN_OPTION = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def main(job: dict[str, Any], stage: Stage) -> None:
    """Check each configuration of `job["configs"]`; what was found goes to the file `job["found"]`.

    `problems` refuse the sweep, `notices` are said before it starts. Of cells that run `elsewhere`
    nothing is asked that only their machine knows.
    """
    problems: list[str] = []
    notices: list[str] = []
    shapes: dict[str, Any] = {}
    for config in job["configs"]:
        problems += _problems(config, job.get("elsewhere", False))
        notices += _notices(config, shapes)
    found = {"problems": list(dict.fromkeys(problems)), "notices": list(dict.fromkeys(notices))}
    write_atomically(Path(job["found"]), json.dumps(found).encode())


def _notices(config: dict[str, Any], shapes: dict[str, Any]) -> list[str]:
    """Return what the method foresees for the model; what is wrong with either comes out later.

    `shapes` keeps the models on meta that have been built, one for all cells of a model.
    """
    try:
        method = instantiate(config["method"])
        if not isinstance(method, ForeseeingMethod):
            return []
        source: ModelSource = instantiate(config["model"])
        key = json.dumps(config["model"], sort_keys=True)
        if key not in shapes:
            shapes[key] = meta_model(source.architecture())
        sentences = method.foresee(shapes[key])
    except (ConfigError, InstantiationException):
        return []
    return [f"{source.name} {config['method']['name']}: {sentence}" for sentence in sentences]


def _problems(config: dict[str, Any], elsewhere: bool) -> list[str]:
    found: list[str] = []
    try:
        hardware = instantiate(config["hardware"])
        if hardware.device == "cuda" and not elsewhere and not torch.cuda.is_available():
            raise ConfigError(
                f"hardware is {hardware.name}, but torch {torch.__version__} sees no CUDA card "
                "here; pass hardware=cpu"
            )
        for role in ("method", "baseline"):
            method = instantiate(config[role])
            method.check(hardware)
            if hardware.offload is not None and not getattr(method, "offloads", False):
                raise ConfigError(
                    f"method {method.name} cannot keep blocks away from the device "
                    "(hardware.offload); methods that can: fp32, bf16, fp16"
                )
        source = instantiate(config["model"])
        _check_encoder(source, config)
        for node in config["suite"]["measures"].values():
            measure = instantiate(node)
            if isinstance(measure, Checking):
                measure.check(source, Path(config["runs_dir"]).absolute() / "cache")
    except ConfigError as error:
        found.append(str(error))
    except InstantiationException as error:
        found.append(_sentence(error, config))
    return found


def _sentence(error: InstantiationException, config: dict[str, Any]) -> str:
    """Return what a failed instantiation says to whoever wrote the configuration."""
    cause = error.__cause__
    if isinstance(cause, ConfigError):
        return str(cause)
    unknown = UNKNOWN_OPTION.search(str(cause))
    if unknown is None:
        return " ".join(str(error).split())
    target, option = unknown.groups()
    owners = {
        node["_target_"].rpartition(".")[2]: f"{group} {node['name']}"
        for group, node in config.items()
        if isinstance(node, dict) and "_target_" in node and "name" in node
    }
    return (
        f"{owners.get(target, target)} has no option {option!r}; leave it out where it is given: "
        "on the command line, or in a profile made for another method"
    )


def _check_encoder(source: ModelSource, config: dict[str, Any]) -> None:
    """Raise ConfigError where the model is an encoder and the method knows causal models only."""
    method = instantiate(config["method"])
    if getattr(method, "encoders", False) or not describes_encoder(source.architecture()):
        return
    raise ConfigError(
        f"method {method.name} takes causal language models, and {source.name} is an encoder; "
        f"methods that take encoders: {ENCODER_METHODS}"
    )
