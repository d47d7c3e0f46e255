"""GPTQ and AWQ checkpoints stored as this project stores matrices, so that its kernels run them.

Codes, zero points and scales are those of the checkpoint (`methods.gptq_format`), scales in the
type they had, so the dequantized weights are equal bit for bit, and schemes are compared on one
kernel. A symmetric checkpoint, whose zero points are all 2**(bits - 1), stores none.

Where act_order scattered the members of groups over the inputs, the columns are put in the order of
the groups, as they lie in memory here; the order is stored (16 or 32 bits an input), and each call
gathers its input in that order first. That gather reads and writes the activations once more, which
a weight-bound decode hardly notices and which no kernel takes in by itself.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.affine import PER_CHANNEL, SCALE_DTYPES, Affine, Quantized
from methods.artefact import dtype_name
from methods.base import Hardware, Matrix
from methods.gptq_format import Integers, Scheme, matrices, read_awq, read_gptq, scheme_of
from methods.gptqmodel_engine import complete, read_checkpoint
from methods.layers import replace
from methods.linear import Layout, QuantizedLinear, QuantizedModule, empty, packed_kernel
from methods.options import refuse_emulated

KERNELS = ("library", "quantbench")
"""What runs a GPTQ or AWQ checkpoint: the kernels of GPTQModel, or this project's."""

NOTE = "repacked without loss from {kind} format; the kernels of this project run it"

GENERATION = "generation_config.json"

WIDEST_INT16 = 2**15


def check_kernel(owner: str, kernel: object, backend: str = "auto") -> None:
    """Raise ConfigError where option `kernel` is none of `KERNELS`, or `backend` has no meaning."""
    if kernel not in KERNELS:
        raise ConfigError(
            f"method.kernel of {owner} is {kernel!r}; it must be one of {', '.join(KERNELS)}"
        )
    if kernel != "library" and backend != "auto":
        raise ConfigError(
            f"method.backend={backend} of {owner} is a kernel of GPTQModel, and method.kernel is "
            f"{kernel!r}; set method.kernel=library or method.backend=auto"
        )


def check(owner: str, bits: int, group_size: int, hardware: Hardware) -> None:
    """Raise ConfigError where our kernels cannot run such matrices on `hardware`."""
    refuse_emulated(hardware)
    packed_kernel(f"method {owner}", bits, group_size, hardware)


def stored_bits(matrix: Matrix, affine: Affine, ordered: bool = False) -> int:
    """Return the bits that a repacked `matrix` takes; `ordered`: with an order of its inputs."""
    order = 8 * order_dtype(matrix.in_features).itemsize * matrix.in_features if ordered else 0
    return Layout.of(matrix, affine).stored_bits + order


def order_dtype(inputs: int) -> torch.dtype:
    """Return the narrowest signed type that numbers `inputs`."""
    return torch.int16 if inputs <= WIDEST_INT16 else torch.int32


class OrderedLinear(QuantizedLinear):
    """Packed weights whose columns are in another order: [..., in] -> [..., out].

    Stored beside them: order int16 or int32 [in], the input that each column belongs to.
    """

    order: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        kind = order_dtype(layout.in_features)
        self.register_buffer("order", torch.empty(layout.in_features, dtype=kind, device="meta"))

    def facts(self) -> dict[str, Any]:
        """Return those of the layout, and that there is an order."""
        return {**super().facts(), "ordered": True}

    def prepare(self, name: str, hardware: Hardware, packed: bool = True) -> None:
        """Choose the kernel, and widen the order to the type that a gather takes."""
        super().prepare(name, hardware, packed)
        self.order = self.order.to(torch.int32)
        self._remark = ", ".join(filter(None, (self._remark, "inputs gathered in group order")))

    def in_c(self, dtype: torch.dtype) -> str:
        """Return why the C decode step does not read it (`methods.decode.InC`)."""
        return "its inputs are gathered in the order of the groups"

    def forward(self, x: Tensor) -> Tensor:
        """Gather the inputs, multiply by the weight, add the bias."""
        return super().forward(x.index_select(-1, self.order))


def build(facts: artefacts.Facts) -> QuantizedModule:
    """Return the module that JSON `facts` describe, its buffers on the meta device."""
    layout = {name: value for name, value in facts.items() if name != "ordered"}
    return OrderedLinear(Layout(**layout)) if facts.get("ordered") else empty(layout)


@contextmanager
def target(kernel: str, into: Path) -> Iterator[Path]:
    """Give the folder that GPTQModel's artefact goes to; for our kernels it is then repacked.

    That is `into` itself for the library's kernels, and a folder beside it for ours.
    """
    if kernel == "library":
        yield into
        return
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.") as scratch:
        folder = Path(scratch, "checkpoint")
        yield folder
        repack(folder, into)


def notes(kernel: str, kind: str) -> list[str]:
    """Return what a row of a checkpoint in the format `kind` (`GPTQ`) says of who runs it."""
    return [] if kernel == "library" else [NOTE.format(kind=kind)]


def repack(checkpoint: Path, into: Path) -> list[Matrix]:
    """Write the GPTQ or AWQ checkpoint in folder `checkpoint` as an artefact into folder `into`.

    Returns the matrices that it holds quantized.

    Raises:
        ConfigError: it cannot be read here, or a matrix has no layout here.
    """
    found = matrices(checkpoint)
    model, modules = read_modules(checkpoint)
    layers = {name: module.facts() for name, module in modules.items()}
    for matrix in found:
        replace(model, matrix, modules[matrix.name])
    complete(model, checkpoint)
    # It says how the checkpoint was stored, which the artefact is not.
    del model.config.quantization_config
    kinds = {parameter.dtype for parameter in model.parameters()}
    artefacts.save(model, into, layers, kinds.pop() if len(kinds) == 1 else torch.float32)
    if (checkpoint / GENERATION).is_file():
        shutil.copyfile(checkpoint / GENERATION, into / GENERATION)
    return found


def read_modules(checkpoint: Path) -> tuple[Any, dict[str, QuantizedModule]]:
    """Return the model in folder `checkpoint` without its quantized matrices, and their modules.

    Raises:
        ConfigError: it cannot be read here, or a matrix has no layout here.
    """
    scheme = scheme_of(checkpoint)
    read = read_gptq if scheme.kind == "gptq" else read_awq
    model, parts = read_checkpoint(checkpoint)
    modules = {}
    for matrix in matrices(checkpoint):
        stored = parts.pop(matrix.name)
        integers = read(stored, scheme.version)
        modules[matrix.name] = module_of(matrix, integers, scheme, stored.get("bias"))
    return model, modules


def module_of(
    matrix: Matrix, integers: Integers, scheme: Scheme, bias: Tensor | None
) -> QuantizedModule:
    """Return the module that stores `integers`, with its columns in the order of their groups.

    Raises:
        ConfigError: its scales have a type, or its groups a size, that has no layout here.
    """
    kind = str(dtype_name(integers.scale))
    if kind not in SCALE_DTYPES:
        raise ConfigError(
            f"layer {matrix.name} has scales in {kind}; they can be {', '.join(SCALE_DTYPES)}"
        )
    order = _order(integers.groups)
    size = _group_size(matrix, integers.groups if order is None else integers.groups[order])
    middle = 2 ** (integers.bits - 1)
    symmetric = scheme.symmetric and bool((integers.zero_point == middle).all())
    affine = Affine(integers.bits, size, symmetric, scale_dtype=kind)
    layout = Layout(**{**asdict(Layout.of(matrix, affine)), "bias": dtype_name(bias)})
    zero_point = None if symmetric else integers.zero_point
    if order is None:
        module, codes = QuantizedLinear(layout), integers.codes
    else:
        module, codes = OrderedLinear(layout), integers.codes[:, order]
        module.order = order.to(order_dtype(matrix.in_features))
    quantized = Quantized(codes, integers.scale, zero_point, integers.bits, matrix.in_features, 0)
    return module.fill(quantized, bias)


def _order(groups: Tensor) -> Tensor | None:
    """Return the inputs in the order of their groups, int64 [in]; None where they are in it."""
    if bool((groups.diff() >= 0).all()):
        return None
    return groups.argsort(stable=True)


def _group_size(matrix: Matrix, groups: Tensor) -> int:
    """Return the size of the groups, or -1 for one group.

    Raises:
        ConfigError: they are not all of one size.
    """
    sizes = sorted(set(groups.bincount().tolist()))
    if len(sizes) != 1:
        raise ConfigError(
            f"layer {matrix.name} has groups of {' and '.join(map(str, sizes))} inputs; the layout "
            "here has groups of one size: run this checkpoint with method.kernel=library"
        )
    return PER_CHANNEL if sizes[0] == matrix.in_features else int(sizes[0])
