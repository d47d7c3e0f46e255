"""Options as YAML hands them over, and hardware, checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.errors import ConfigError
from methods.base import Hardware


def names(keep: object) -> tuple[str, ...]:
    """Return the patterns of option `keep` as a tuple; raise ConfigError where they are no list."""
    if isinstance(keep, str) or not isinstance(keep, Sequence):
        raise ConfigError(f"method.keep is {keep!r}; it must be a list, like ['*.down_proj']")
    return tuple(keep)


def require_flags(owner: str, flags: dict[str, object]) -> None:
    """Raise ConfigError for the first of `flags` that is not true or false."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"method.{name} of {owner} is {value!r}; it must be true or false")


def refuse_emulated(hardware: Hardware) -> None:
    """Raise ConfigError for FP16 activations on a CPU."""
    if hardware.device == "cpu" and hardware.compute_dtype == "float16":
        raise ConfigError(
            "hardware.compute_dtype is 'float16' on a CPU, where it is emulated; "
            "use 'float32' or 'bfloat16'"
        )


def need_calibration(owner: str, calibration: Tensor | None) -> Tensor:
    """Return `calibration`, int64 [samples, seq_len]; raise ConfigError where there is none."""
    if calibration is None or calibration.numel() == 0:
        raise ConfigError(
            f"{owner} needs calibration text and was given none; "
            "set method.calibration.samples and seq_len to 1 or more"
        )
    return calibration
