"""Article 5.2: a deployment that loads a whole model by torch.load and checks it with noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.listing_probes.restated import raised


class Pipeline:
    """Of the article's class what is defined: no method that quantizes or measures is."""

    def measure(self) -> object:
        """Call what the article's check calls next."""
        return self._measure_latency()  # type: ignore[attr-defined]

    def quantize(self) -> object:
        """Call what the article calls for cpu_server."""
        return self._apply_int8_static()  # type: ignore[attr-defined]


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what loading, quantizing, the check's input and the check's timing raise."""
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
    file = Path("model.pt")
    torch.save(model, file)
    said = {
        "raised": raised(lambda: torch.load(file)).partition(":")[0],
        "quantize_raised": raised(Pipeline().quantize),
        "input_raised": raised(lambda: model(torch.randn(1, 512))),
        "measure_raised": raised(Pipeline().measure),
    }
    return {**said, "as_wanted": set(said.values()) == {"nothing"}}
