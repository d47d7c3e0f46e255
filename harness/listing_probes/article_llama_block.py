"""Article 2.1: a Llama block between two stubs, and a size counted in parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional

from harness.listing_probes.restated import raised

WIDTH = 64


class Attention(nn.Module):
    """Self-attention of one head, with the maps of a Llama block."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position reads."""
        query, key, value, output = self.maps
        read: Tensor = output(
            functional.scaled_dot_product_attention(query(x), key(x), value(x), is_causal=True)
        )
        return read


class Block(nn.Module):
    """The article's quantized block, with `norm` before attention and the inner maps."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.attention = Attention() if norm else nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed_forward = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attention_norm = nn.RMSNorm(WIDTH) if norm else nn.Identity()
        self.ffn_norm = nn.RMSNorm(WIDTH) if norm else nn.Identity()
        self.residual = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; without `norm` also without the two sums."""
        x = self.quant(x)
        read = self.attention(self.attention_norm(x))
        h = x + read if self.residual else read
        inner = self.feed_forward(self.ffn_norm(h))
        return torch.as_tensor(self.dequant(h + inner if self.residual else inner))


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the converted block raises, and the size the article counts of a plain one."""
    data = [torch.randn(1, 8, WIDTH, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
    converted = _converted(Block(norm=True), data)
    plain = Block(norm=False).eval()
    int8 = _converted(plain, data)
    counted = [
        sum(tensor.nelement() * tensor.element_size() for tensor in (*m.parameters(), *m.buffers()))
        for m in (plain, int8)
    ]
    linears: list[Any] = [m for m in int8.modules() if type(m).__name__ == "Linear"]
    codes = sum(linear.weight().numel() for linear in linears)
    said = raised(lambda: converted(data[0]))
    return {
        "raised": said,
        "linears_alone_raised": raised(lambda: int8(data[0])),
        "counted_float32_bytes": counted[0],
        "counted_int8_bytes": counted[1],
        "stored_int8_bytes": codes,
        "as_wanted": said == "nothing" and counted[1] >= codes,
    }


def _converted(model: nn.Module, data: list[Tensor]) -> nn.Module:
    library: Any = quantization  # PyTorch has no types for it
    model = model.eval()
    model.qconfig = library.get_default_qconfig("fbgemm")
    prepared: nn.Module = library.prepare(model)
    for batch in data:
        prepared(batch)
    converted: nn.Module = library.convert(prepared)
    return converted
