"""compressed-tensors checkpoints (vLLM's own format for quantized models), loaded and run.

Such a folder is what llm-compressor's `save_pretrained(save_compressed=True)` writes: `config.json`
with a `quantization_config`, safetensors of int8, float8 or packed weights with `weight_scale` (and
`input_scale` where activations are static), `recipe.yaml`. It can be deployed as it is.

transformers loads it and turns all weights into floats at the first call. `load` puts modules in
place that keep the stored bytes wherever one runs the scheme: those of
`methods/compressed_layers.py` for INT8 and FP8, `QuantizedLinear` for packed integers without
rounded activations (W4A16). Other matrices it leaves to the library, as `simulated`;
`load_dequantized` leaves all of them to it. So the two are independent readings of one folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kernels.errors import ConfigError
from methods.affine import BITS, LARGEST_GROUP, PER_CHANNEL, SMALLEST_GROUP, Quantized
from methods.base import Hardware, KernelUse
from methods.compressed_layers import Activations, Fp8Linear, Int8Linear
from methods.engine import TorchEngine
from methods.layers import Scope, select
from methods.library import require
from methods.linear import Layout, QuantizedModule, module_of

PATH_TOLERANCE = 0.2
"""Largest difference between the logits of the stored bytes and of the library's float weights, for
`methods.packed.compare_paths`. Where activations stay floats: 4e-7. Where they are rounded, a last
bit of a sum tips a rounding now and then, and each tip costs a whole step: in a model of 6 M
parameters up to 0.03 with INT8 (whose scales put a token's largest value on the tie at 127.5) and
E4M3, 0.05 with E5M2, no more in bfloat16. One matrix with its rows in the wrong order gives 0.1 to
1.3 in a tiny model, all of them more."""

PLAIN = "aten::linear on decompressed float weights"


def quantized_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules whose weights compressed-tensors has a scheme for."""
    schemes = {name: getattr(m, "quantization_scheme", None) for name, m in model.named_modules()}
    return [name for name, scheme in schemes.items() if scheme is not None and scheme.weights]


def load(folder: Path, hardware: Hardware) -> TorchEngine:
    """Load a compressed-tensors checkpoint; stored bytes are run wherever a module here can.

    Raises:
        ConfigError: the model keeps experts in stacks.
    """
    model = _library_model(folder)
    uses: dict[str, KernelUse] = {}
    for name in quantized_modules(model):
        layer = _runnable(model.get_submodule(name))
        if layer is not None:
            layer.prepare(name, hardware)
            model.set_submodule(name, layer)
            uses[name] = layer.use(name)
    uses |= _decompress(model)
    # What is stored as it was lies in buffers, which keep their types.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, hardware.compute_dtype))
    return TorchEngine(_on(model, hardware), hardware.device, list(uses.values()))


def load_dequantized(folder: Path, hardware: Hardware) -> TorchEngine:
    """Load with every matrix decompressed by the library, in float32 whatever `hardware` says.

    Raises:
        ConfigError: the model keeps experts in stacks.
    """
    model = _library_model(folder)
    uses = _decompress(model)
    return TorchEngine(_on(model, hardware), hardware.device, list(uses.values()))


def _library_model(folder: Path) -> Any:
    """Return the model as transformers loads it: float32, quantized modules still compressed."""
    require("compressed_tensors", "a compressed-tensors checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    _refuse_stacks(model)
    for parameter in model.parameters():
        # transformers leaves one that it renames while loading (GPT-NeoX's head) in its own type.
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def _refuse_stacks(model: Any) -> None:
    for matrix in select(model, Scope()).matrices:
        if matrix.count > 1:
            raise ConfigError(
                f"{matrix.name} is a stack of experts: transformers decompresses those of a "
                "compressed-tensors checkpoint as it loads them, and nothing says how they ran"
            )


def _on(model: Any, hardware: Hardware) -> Any:
    return model if hardware.device == "cpu" else model.to(hardware.device)


def _decompress(model: Any) -> dict[str, KernelUse]:
    """Decompress what is still compressed, now and not at the first call; return what runs it."""
    left = quantized_modules(model)
    compressor = model.hf_quantizer.compressor
    if left:
        compressor.decompress_model(model)
    else:
        compressor.remove_decompression_hook(model)
    uses = {}
    for name in left:
        module = model.get_submodule(name)
        inputs = module.quantization_scheme.input_activations
        rounded = "" if inputs is None else f", activations rounded to {inputs.num_bits} bits"
        layer, kernel = type(module).__name__, PLAIN + rounded
        uses[name] = KernelUse(name, layer, kernel, "simulated", module.weight.numel())
        module.register_forward_pre_hook(_in_three_dimensions)
        module.register_forward_hook(_in_two_dimensions)
    return uses


def _in_three_dimensions(module: Any, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Give [tokens, in] (OPT's MLP) a batch of one.

    compressed-tensors reduces all dimensions but the first two to a scale a token: of two, none,
    which its code takes for all. A token's result would depend on the tokens beside it.
    """
    module.was_flat = inputs[0].ndim == 2
    return inputs[0][None] if module.was_flat else None


def _in_two_dimensions(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    return output[0] if module.was_flat else None


def _runnable(module: Any) -> Int8Linear | Fp8Linear | QuantizedModule | None:
    """Return the module that runs compressed `module` as it is stored; None: there is none."""
    scheme = module.quantization_scheme
    activations = _activations(scheme.input_activations, scheme.weights)
    if activations is None or scheme.output_activations is not None:
        return None
    bias = None if module.bias is None else module.bias.detach()
    if getattr(module, "weight_packed", None) is not None:
        return _packed_integers(module, bias) if activations == "none" else None
    weight = getattr(module, "weight", None)
    by_row = scheme.weights.strategy in ("channel", "tensor") and scheme.weights.symmetric
    if weight is None or not by_row:
        return None
    scale = module.weight_scale.detach()
    input_scale = module.input_scale.detach() if activations == "static" else None
    if weight.dtype == torch.float8_e4m3fn:
        return Fp8Linear(weight.detach(), scale, activations, input_scale, bias)
    if weight.dtype == torch.int8 and scheme.weights.num_bits == 8 and activations != "none":
        return Int8Linear(weight.detach(), scale, input_scale, bias)
    return None


def _packed_integers(module: Any, bias: Tensor | None) -> QuantizedModule | None:
    """Return this project's own module for packed integers (W4A16 and its kin), or None.

    `weight_packed` is int32 [out, words], a row one little-endian stream of codes; `weight_scale`
    [out, groups]; `weight_zero_point` int32 [words, groups], packed along the rows.
    """
    weights = module.quantization_scheme.weights
    out_features, in_features = (int(size) for size in module.weight_shape)
    if weights.type != "int" or weights.num_bits not in BITS or hasattr(module, "weight_g_idx"):
        return None
    if weights.strategy == "channel":
        size = PER_CHANNEL
    elif weights.strategy == "group" and in_features % weights.group_size == 0:
        size = weights.group_size
        if not SMALLEST_GROUP <= size <= LARGEST_GROUP:
            return None
    else:
        return None
    zero_point = None
    if not weights.symmetric:
        words = module.weight_zero_point.T.contiguous()
        zero_point = codes_of(words, weights.num_bits, out_features).T.contiguous()
    layout = Layout(
        kind="linear",
        out_features=out_features,
        in_features=in_features,
        bits=weights.num_bits,
        group_size=size,
        symmetric=weights.symmetric,
        per_tensor=False,
        scale_dtype="float32",
        bias=None if bias is None else "float32",
    )
    codes = codes_of(module.weight_packed, weights.num_bits, in_features)
    scale = module.weight_scale.detach()
    quantized = Quantized(codes, scale, zero_point, weights.num_bits, in_features, 0)
    return module_of(layout).fill(quantized, bias)


def codes_of(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return uint8 codes [rows, columns] of int32 `words` [rows, n], little-endian streams."""
    rows = words.shape[0]
    stream = words.contiguous().view(torch.uint8)
    ones = stream[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    places = torch.arange(bits, dtype=torch.uint8)
    codes = ones.reshape(rows, -1)[:, : columns * bits].reshape(rows, columns, bits) << places
    return codes.sum(-1, dtype=torch.uint8)


def _activations(inputs: Any, weights: Any) -> Activations | None:
    """Return how activations are rounded, as the modules here name it; None: none of these ways."""
    if inputs is None:
        return "none"
    if inputs.type != weights.type or inputs.num_bits != 8 or not inputs.symmetric:
        return None
    if inputs.dynamic is True and inputs.strategy == "token":
        return "dynamic"
    return "static" if inputs.dynamic is False and inputs.strategy == "tensor" else None
