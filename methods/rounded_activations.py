"""What the methods share that round activations themselves: ZeroQuant, RPTQ and BitNet.

There is no integer kernel for their scales on the machines this runs on, so each of their layers
rounds its input to the grid and multiplies the rounded values in float32, whatever the type of the
other activations: in bfloat16 a product of code and scale would be rounded a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from methods import artefact as artefacts
from methods.base import Hardware, KernelUse
from methods.engine import TorchEngine

STACKED_EXPERTS = "stack of experts: the model multiplies it, so its input cannot be rounded here"

LARGEST_INT8 = 127


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token of floating x [..., in] to its own symmetric INT8 grid.

    Returns codes, whole numbers from -127 to 127 in float32 [..., in], and steps, float32 [..., 1]:
    step = max|token| / 127, code = round(token / step), as Ma et al. 2024 (BitNet b1.58, section 2)
    and, but for the 127, Yao et al. 2022 (ZeroQuant, section 4.1). Zeros stay zeros.
    """
    wide = x.float()
    step = wide.abs().amax(-1, keepdim=True) / LARGEST_INT8
    # Any step will do for a token of zeros; a subnormal one would divide inexactly.
    step = step.clamp_(min=torch.finfo(torch.float32).smallest_normal)
    return (wide / step).round_(), step


def round_tokens(x: Tensor) -> Tensor:
    """Return the values step * code of `token_codes`, float32 [..., in]."""
    codes, step = token_codes(x)
    return codes.mul_(step)


class Layer(Protocol):
    """A loaded layer that can be made ready to run."""

    def prepare(self, name: str, hardware: Hardware) -> None:
        """Make what running on `hardware` needs beside the stored tensors."""
        ...

    def use(self, name: str) -> KernelUse:
        """Return what runs the layer called `name`."""
        ...


def load_engine(
    artefact: Path, hardware: Hardware, build: Callable[[artefacts.Facts], nn.Module]
) -> TorchEngine:
    """Load an artefact whose replaced layers are made by `build` from their facts: `Layer`s."""
    layers: dict[str, Any] = {}

    def remember(name: str, facts: artefacts.Facts) -> nn.Module:
        layers[name] = build(facts)
        return layers[name]  # type: ignore[no-any-return]

    dtype = getattr(torch, hardware.compute_dtype)
    model = artefacts.load(artefact, remember, dtype, hardware.device)
    uses = []
    for name, layer in layers.items():
        layer.prepare(name, hardware)
        uses.append(layer.use(name))
    return TorchEngine(model, hardware.device, uses)
