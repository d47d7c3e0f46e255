"""Other libraries' packed linears, each through its public interface, on whatever device it takes.

Their interfaces as of bitsandbytes 0.50, torchao 0.18, hqq 0.2.8; gemlite 0.4 and humming-kernels
0.1 as their own documents show them. What a library does not take it refuses itself, and the bench
writes down its words.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from kernels.bench_core import Contender, Given, Prepared, codes_of, held_bytes, zeros_of

OWN_GRID = "a grid of its own"
NF4_GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer without bias that holds a weight [out, in]."""
    out, columns = weight.shape
    linear = nn.Linear(columns, out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return linear


class NormalFloat4(nn.Module):
    """bitsandbytes' 4-bit NormalFloat weights (QLoRA, arXiv 2305.14314)."""

    def __init__(self, weight: Tensor, group_size: int) -> None:
        super().__init__()
        self.library: Any = importlib.import_module("bitsandbytes")
        self.weight, self.state = self.library.functional.quantize_4bit(
            weight, blocksize=group_size, quant_type="nf4"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NormalFloat4:
        # A module of the library cannot be copied, and is shared.
        twin = NormalFloat4.__new__(NormalFloat4)
        nn.Module.__init__(twin)
        twin.library, twin.weight = self.library, self.weight.clone()
        twin.state = self.library.functional.QuantState.from_dict(
            {name: _cloned(value) for name, value in self.state.as_dict().items()},
            self.weight.device,
        )
        return twin

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight."""
        y: Tensor = self.library.matmul_4bit(x, self.weight, self.state)
        return y


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def bitsandbytes_nf4(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare NF4 with the block size of the groups; blocks run on over the ends of rows."""
    weight, group_size = given.weight, given.scheme.group_size
    if group_size not in NF4_GROUPS:
        return f"takes no groups of {group_size} inputs"
    module = NormalFloat4(weight.to(dtype).contiguous(), group_size)
    return Prepared(module, module.weight.nbytes + module.state.absmax.nbytes, OWN_GRID)


def bitsandbytes_int8(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare LLM.int8() (arXiv 2208.07339) without outliers: both sides rounded to 8 bits."""
    weight = given.weight
    library = importlib.import_module("bitsandbytes")
    out, columns = weight.shape
    layer = library.nn.Linear8bitLt(columns, out, bias=False, has_fp16_weights=False)
    layer.weight = library.nn.Int8Params(
        weight.to(torch.float16).cpu(), requires_grad=False, has_fp16_weights=False
    )
    layer = layer.to(weight.device).eval()
    return Prepared(layer, out * columns + 4 * out, "activations rounded to 8 bits")


def torchao(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare torchao's weight-only linear: int8, and on a card the tile-packed int4 layout."""
    weight, bits, group_size = given.weight, given.scheme.bits, given.scheme.group_size
    library = importlib.import_module("torchao.quantization")
    if bits == 8:
        config = library.Int8WeightOnlyConfig(set_inductor_config=False)
    elif weight.device.type == "cuda":
        config = library.Int4WeightOnlyConfig(
            group_size=group_size,
            set_inductor_config=False,
            int4_packing_format="tile_packed_to_4d",
        )
    else:
        return "has no int4 linear for a processor without compiling"
    model = nn.Sequential(_linear(weight, dtype))
    library.quantize_(model, config)
    groups = -(-weight.shape[1] // group_size) if group_size > 0 else 1
    # Codes and, a group, a scale of 16 bits; the int4 layout keeps a zero point as large beside it.
    stored = weight.numel() * bits // 8 + weight.shape[0] * groups * (4 if bits == 4 else 2)
    return Prepared(model, stored, OWN_GRID)


def hqq(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare HQQ's linear with its default (PyTorch) backend: dequantized at each call."""
    weight, bits, group_size = given.weight, given.scheme.bits, given.scheme.group_size
    library = importlib.import_module("hqq.core.quantize")
    config = library.BaseQuantizeConfig(
        nbits=bits, group_size=None if group_size == -1 else group_size, axis=1
    )
    # Its search takes half a minute for a matrix on a processor, and no speed depends on it.
    config["weight_quant_params"]["optimize"] = False
    layer = library.HQQLinear(
        _linear(weight, dtype), config, compute_dtype=dtype, device=str(weight.device)
    )
    meta = [value for value in layer.meta.values() if isinstance(value, Tensor)]
    nbytes = layer.W_q.nbytes + sum(tensor.nbytes for tensor in meta)
    return Prepared(layer, nbytes, f"{OWN_GRID}, without its search")


def gemlite(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare gemlite's Triton linear from our own codes and scales."""
    weight, bits, group_size = given.weight, given.scheme.bits, given.scheme.group_size
    core = importlib.import_module("gemlite.core")
    out, columns = weight.shape
    if columns % group_size and group_size != -1:
        return f"takes whole groups of {group_size} inputs"
    kind = core.DType.BF16 if dtype == torch.bfloat16 else core.DType.FP16
    layer = core.GemLiteLinear(
        W_nbits=bits,
        group_size=columns if group_size == -1 else group_size,
        in_features=columns,
        out_features=out,
        input_dtype=kind,
        output_dtype=kind,
    )
    stored = given.codes
    layer.pack(codes_of(stored), stored.scale.to(dtype), zeros_of(stored).to(dtype), None)
    return Prepared(layer, held_bytes(layer))


def humming(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare humming's linear; it rounds the weight itself and compiles its kernels by nvcc."""
    weight, bits, group_size = given.weight, given.scheme.bits, given.scheme.group_size
    library = importlib.import_module("humming.layer")
    config: dict[str, Any] = {"dtype": f"int{bits}"}
    if group_size != -1:
        config["group_size"] = group_size
    out, columns = weight.shape
    layer = library.HummingLayer(
        shape_n=out, shape_k=columns, weight_config=config, torch_dtype=dtype
    ).cuda()
    layer.load_from_unquantized(weight.to(dtype))
    layer.transform()
    layer.prepare_default_kernel_configs()
    return Prepared(layer, held_bytes(layer), OWN_GRID)


LIBRARIES = (
    Contender("bitsandbytes NF4", "peer", (4,), bitsandbytes_nf4, "bitsandbytes"),
    Contender(
        "bitsandbytes int8", "peer", (8,), bitsandbytes_int8, "bitsandbytes", activation_bits=(8,)
    ),
    Contender("torchao", "peer", (8, 4), torchao, "torchao"),
    Contender("hqq", "peer", (8, 4, 3, 2), hqq, "hqq"),
)
"""On either device."""

CARD_LIBRARIES = (
    Contender("gemlite", "peer", (8, 4, 2), gemlite, "gemlite", zero_points=True),
    Contender("humming-kernels", "peer", (8, 4, 3, 2), humming, "humming"),
)
"""On a card only."""
