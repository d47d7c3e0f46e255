"""Packed weights of which only those that are not zero are stored: one bit a weight says which.

An artefact of packed modules (`methods.linear`) is written anew: in place of `packed`, each layer
has `bitmap`, one bit a weight of a row after another, the first weight in the lowest bit, and
`nonzero`, the codes of the weights whose bit is set, in the same order and packed as one row
(`kernels.pack`). Zero is a weight whose code is its zero point, pruned or rounded to it. For 2:4 a
bitmap takes what the usual two 2-bit places in four weights take: four bits.

When it is loaded the codes are put back into rows, so the kernels, their speed and the memory that
running takes are those of dense weights: what is saved is the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.errors import ConfigError
from kernels.pack import pack, packed_bytes, unpack
from kernels.reference import unpack_zero_point
from methods.artefact import LAYERS, WEIGHTS
from methods.linear import (
    Kind,
    Layout,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedModule,
    empty,
)

COUNT = "nonzeros"
"""The fact beside those of `Layout`: how many codes of the layer are stored."""


def bits_per_weight(bits: float, zeros: float, store: str, scales: float = 0.0) -> float:
    """Return the bits that a weight takes where the share `zeros` of them is zero.

    `scales` are the bits a weight of scales and zero points. Dense, a zero takes what any code
    takes; with a bitmap, one bit for where it is.
    """
    return scales + (bits if store == "dense" else 1 + (1 - zeros) * bits)


def compression(bits: float, zeros: float, store: str, before: float = 32.0) -> float:
    """Return by how much weights of `before` bits become smaller: 4 for FP32 to dense INT8."""
    return before / bits_per_weight(bits, zeros, store)


def zeros_needed(ratio: float, bits: float, before: float = 32.0) -> float:
    """Return the share of zeros with which a bitmap and codes of `bits` reach `ratio`."""
    return 1 - (before / ratio - 1) / bits


def zero_codes(scale: Tensor, zero_point: Tensor | None, layout: Layout) -> Tensor:
    """Return the code that stands for 0 at each weight, uint8 [..., out, covered]."""
    zeros = unpack_zero_point(zero_point, scale, layout.bits)
    shape = (*scale.shape[:-2], layout.out_features, layout.covered)
    if zeros is None:
        return torch.full(shape, 2 ** (layout.bits - 1), dtype=torch.uint8, device=scale.device)
    width = layout.covered // scale.shape[-1]
    return zeros.repeat_interleave(width, dim=-1).expand(shape)


def compress(folder: Path) -> dict[str, int]:
    """Write the artefact in `folder` anew with bitmaps; return layer -> bits stored for it.

    Raises:
        ConfigError: a layer of it is not stored as `methods.linear` has it.
    """
    document = json.loads((folder / LAYERS).read_text()) if (folder / LAYERS).exists() else {}
    layers: dict[str, dict[str, Any]] = document.get("layers", {})
    if not layers or any("kind" not in facts for facts in layers.values()):
        raise ConfigError(
            "method.store=bitmap takes weights that are packed as this project packs them, and "
            "method.then wrote others; choose method@method.then=rtn, or method.store=dense"
        )
    tensors: dict[str, Tensor] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
            owner, _, own = name.rpartition(".")
            if owner not in layers or own != "packed":
                tensors[name] = file.get_tensor(name)
        for name, facts in layers.items():
            layout = Layout(**facts)
            zero_point = None if layout.symmetric else tensors[f"{name}.zero_point"]
            zeros = zero_codes(tensors[f"{name}.scale"], zero_point, layout)
            codes = unpack(file.get_tensor(f"{name}.packed"), layout.bits, layout.covered)
            stored = codes[codes != zeros]
            bitmap = np.packbits((codes != zeros).numpy(), bitorder="little")
            tensors[f"{name}.bitmap"] = torch.from_numpy(bitmap)
            tensors[f"{name}.nonzero"] = pack(stored, layout.bits)
            layers[name] = {**facts, COUNT: stored.numel()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / LAYERS).write_text(json.dumps(document, indent=1))
    parts = ("bitmap", "nonzero", "scale", "zero_point")
    return {
        name: sum(8 * tensors[key].nbytes for part in parts if (key := f"{name}.{part}") in tensors)
        for name in layers
    }


def stored_bits(layout: Layout, nonzeros: int) -> int:
    """Return the bits of a layer of which `nonzeros` weights are stored."""
    places = layout.count * layout.out_features * layout.covered
    dense = 8 * layout.count * layout.out_features * packed_bytes(layout.covered, layout.bits)
    return layout.stored_bits - dense + 8 * (-(-places // 8) + packed_bytes(nonzeros, layout.bits))


class _Sparse(QuantizedModule):
    """A packed module that is read as bitmap and codes, and is the usual one once it is."""

    bitmap: Tensor
    nonzero: Tensor

    def __init__(self, layout: Layout, nonzeros: int) -> None:
        super().__init__(layout)
        self.packed = None
        places = layout.count * layout.out_features * layout.covered
        with torch.device("meta"):
            self.bitmap = nn.Buffer(torch.empty(-(-places // 8), dtype=torch.uint8))
            self.nonzero = nn.Buffer(
                torch.empty(packed_bytes(nonzeros, layout.bits), dtype=torch.uint8)
            )
        self.nonzeros = nonzeros
        self.register_load_state_dict_post_hook(_expand)  # type: ignore[no-untyped-call]


def _expand(module: nn.Module, _: object) -> None:
    """Put the codes back into rows.

    Raises:
        ValueError: the bitmap says another number of codes than there are.
    """
    if not isinstance(module, _Sparse) or module.scale is None:
        return
    layout = module.layout
    codes = zero_codes(module.scale, module.zero_point, layout).clone()
    places = np.unpackbits(module.bitmap.cpu().numpy(), count=codes.numel(), bitorder="little")
    mask = torch.from_numpy(places.astype(bool)).to(codes.device).view(codes.shape)
    if int(mask.sum()) != module.nonzeros:
        raise ValueError(
            f"a bitmap marks {int(mask.sum())} weights, but {module.nonzeros} are stored"
        )
    codes[mask] = unpack(module.nonzero, layout.bits, module.nonzeros)
    module.packed = pack(codes, layout.bits)
    del module.bitmap, module.nonzero


class SparseLinear(_Sparse, QuantizedLinear):
    """A linear map stored as bitmap and codes."""


class SparseExperts(_Sparse, QuantizedExperts):
    """A stack of experts stored as bitmaps and codes."""


class SparseEmbedding(_Sparse, QuantizedEmbedding):
    """An embedding stored as bitmap and codes."""


_MODULES: dict[Kind, type[_Sparse]] = {
    "linear": SparseLinear,
    "embedding": SparseEmbedding,
    "experts": SparseExperts,
}


def build(facts: dict[str, Any]) -> QuantizedModule:
    """Return the module that JSON `facts` describe, sparse or dense, its buffers on meta."""
    if COUNT not in facts:
        return empty(facts)
    plain = {name: value for name, value in facts.items() if name != COUNT}
    layout = Layout(**plain)
    return _MODULES[layout.kind](layout, facts[COUNT])
