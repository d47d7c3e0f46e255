"""What the tests of the methods with layers of their own share: what went in and out, and sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from methods.artefact import WEIGHTS
from methods.base import Engine, QuantizeReport


def passed_through(engine: Engine, ids: Tensor, kind: type[nn.Module]) -> dict[str, Any]:
    """Return name -> (input, output) of each layer of class `kind` while `engine` reads `ids`."""
    loaded: Any = engine
    seen: dict[str, Any] = {}

    def watching(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = (inputs[0].clone(), output.clone())

        return hook

    handles = [
        module.register_forward_hook(watching(name))
        for name, module in loaded.model.named_modules()
        if isinstance(module, kind)
    ]
    engine.prefill(ids)
    for handle in handles:
        handle.remove()
    return seen


def bits_on_disk(report: QuantizeReport, folder: Path) -> int:
    """Return the bits of all tensors of the quantized matrices in `folder`, biases left out."""
    own = tuple(f"{matrix.name}." for matrix in report.quantized)
    return sum(
        8 * tensor.nbytes
        for name, tensor in load_file(folder / WEIGHTS).items()
        if name.startswith(own) and not name.endswith(".bias")
    )
