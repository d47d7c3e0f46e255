"""Guide, part 9: pruning by 30 %; what a file of the pruned model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Prune with the listing's function, quantize by quantize_dynamic, and save all three."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    sizes = [_bytes(model)]
    pruned = names["prune_model"](model, amount=0.3)
    sizes.append(_bytes(pruned))
    quantize: Any = torch.ao.quantization.quantize_dynamic
    int8 = quantize(pruned, {nn.Linear}, torch.qint8)
    sizes.append(_bytes(int8))
    weights = [layer.weight for layer in pruned if isinstance(layer, nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "zeros_percent": 100 * zeros / sum(weight.numel() for weight in weights),
        "before_bytes": sizes[0],
        "pruned_bytes": sizes[1],
        "int8_bytes": sizes[2],
        "pruned_ratio": sizes[0] / sizes[1],
        "int8_ratio": sizes[0] / sizes[2],
        "as_wanted": sizes[1] < 0.9 * sizes[0],
    }


def _bytes(model: nn.Module) -> int:
    file = Path("sized.pt")
    torch.save(model.state_dict(), file)
    return file.stat().st_size
