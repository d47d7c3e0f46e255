"""Decoder blocks kept away from the device and brought there for each call (accelerate's hooks).

For models that do not fit: the slow end of what a machine can run, shown as a row of its own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload

from methods.base import Hardware, KernelUse
from methods.engine import TorchEngine
from methods.layers import decoder_blocks


class OffloadedEngine(TorchEngine):
    """A TorchEngine some of whose blocks lie in a folder of their own, deleted when it closes."""

    def __init__(self, model: Any, device: str, uses: list[KernelUse], folder: Path) -> None:
        super().__init__(model, device, uses)
        self.folder = folder

    def close(self) -> None:
        """Drop the model and its folder."""
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)


def offloaded_engine(
    model: Any, hardware: Hardware, uses: Sequence[KernelUse], beside: Path
) -> OffloadedEngine:
    """Keep the first decoder blocks of `model` on the device, as `hardware` says; offload the rest.

    `model` is on the CPU and changed in place; everything but the blocks goes to the device.
    Blocks stay as long as their bytes fit into `hardware.resident_bytes`; what goes to disk goes
    to a folder beside the file or folder `beside`. The engine says of each matrix of `uses` what
    is brought from where.
    """
    folder = Path(tempfile.mkdtemp(prefix=".offload-", dir=beside.parent))
    device = torch.device(hardware.device)
    prefix, blocks = decoder_blocks(model)
    free = hardware.resident_bytes
    away: list[str] = []
    for index, block in enumerate(blocks):
        tensors = [*block.parameters(), *block.buffers()]
        free -= sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if free >= 0:
            block.to(device)
            continue
        away.append(f"{prefix}.{index}.")
        if hardware.offload == "disk":
            disk_offload(block, folder / str(index), execution_device=device, offload_buffers=True)
        else:
            cpu_offload(block, execution_device=device, offload_buffers=True)
    _move_rest(model, device)
    said = f", read from {'disk' if hardware.offload == 'disk' else 'main memory'} at each call"
    told = [
        replace(use, kernel=use.kernel + said) if use.name.startswith(tuple(away)) else use
        for use in uses
    ]
    return OffloadedEngine(model, hardware.device, told, folder)


def _move_rest(model: Any, device: torch.device) -> None:
    """Move what is outside the decoder blocks to `device`, module by module."""
    _, blocks = decoder_blocks(model)
    inside = {id(module) for module in blocks.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(device)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
