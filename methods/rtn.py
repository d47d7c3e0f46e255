"""Round-to-nearest: every weight becomes the nearest of its group's levels, no data needed.

The conventions are those of `methods.affine`; weights, scales and zero points are stored packed at
their true widths (`kernels.pack`). Activations stay floating point, or are rounded to INT8 token by
token at each call (`activation_bits: 8`, `methods.rtn_activations`): a method of its own, of other
quality and other speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods import rtn_activations
from methods.affine import LARGEST_GROUP, SMALLEST_GROUP, Affine, Quantized, quantize
from methods.base import Engine, Hardware, Matrix, QuantizeReport
from methods.int8_linear import PATH_TOLERANCE as INTEGER_PATH_TOLERANCE
from methods.layers import (
    Scope,
    bias_of,
    check_finite,
    is_tied,
    replace,
    select,
    stack_is_transposed,
    weight_of,
)
from methods.linear import Layout, QuantizedModule, empty, module_of, packed_kernel
from methods.options import refuse_emulated
from methods.packed import PATH_TOLERANCE, load_engine

ON_INDIVISIBLE = ("error", "pad")
TERNARY = "symmetric 2 bits: the codes used are -1, 0 and 1 (ternary)"


@dataclass(frozen=True)
class RTN:
    """Round-to-nearest with all its options.

    Attributes:
        name: as tables show it.
        bits, group_size, symmetric, per_tensor, scale_search, percentile, scale_dtype: see
            `methods.affine.Affine`.
        head, embeddings: quantize these too.
        keep: shell patterns of module names that stay as they are.
        on_indivisible: what to do where the group size does not divide a width: `error`, or `pad`
            the row with zero weights.
        activation_bits: of the tokens that linear maps read: None (floating point) or 8.
    """

    name: str
    bits: int
    group_size: int
    symmetric: bool = False
    per_tensor: bool = False
    scale_search: str = "minmax"
    percentile: float = 99.9
    scale_dtype: str = "float16"
    head: bool = False
    embeddings: bool = False
    keep: tuple[str, ...] = ()
    on_indivisible: str = "error"
    activation_bits: int | None = None

    needs_calibration: ClassVar[bool] = False
    encoders: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Checked here, before any weight is loaded.
        _ = self.affine
        if isinstance(cast(Any, self.keep), str):
            raise ConfigError(f"keep is {self.keep!r}; it must be a list, as [{self.keep}]")
        # Hydra hands over a list of its own type, which cannot be hashed.
        object.__setattr__(self, "keep", tuple(self.keep))
        if self.on_indivisible not in ON_INDIVISIBLE:
            raise ConfigError(
                f"on_indivisible is {self.on_indivisible!r}; it must be 'error' or 'pad'"
            )
        if self.activation_bits not in (None, rtn_activations.BITS):
            raise ConfigError(
                f"method.activation_bits of {self.name} is {self.activation_bits!r}; it must be "
                f"{rtn_activations.BITS}, or null for activations in floating point"
            )

    @property
    def path_tolerance(self) -> float:
        """Largest difference of the two paths; rounded activations tip now and then."""
        return PATH_TOLERANCE if self.activation_bits is None else INTEGER_PATH_TOLERANCE

    @property
    def affine(self) -> Affine:
        """The arithmetic the options ask for; raises ConfigError where there is none."""
        return Affine(
            self.bits,
            self.group_size,
            self.symmetric,
            self.per_tensor,
            self.scale_search,
            self.percentile,
            self.scale_dtype,
        )

    def check(self, hardware: Hardware) -> None:
        """Refuse FP16 activations on a CPU, and a fallback that the hardware does not allow."""
        refuse_emulated(hardware)
        owner = f"method {self.name}"
        if self.activation_bits is None:
            packed_kernel(owner, self.bits, self.group_size, hardware)
            return
        rtn_activations.integer_kernel(owner, self.bits, self.group_size, self.symmetric, hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """Bits of the packed weights, scales and zero points of `matrix`, padding included."""
        return Layout.of(matrix, self.affine).stored_bits

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return what is quantized and what is left.

        Raises:
            ConfigError: the group size does not divide a width and `on_indivisible` is `error`;
                or an embedding does more than look rows up.
        """
        selection = select(model, Scope(self.head, self.embeddings, self.keep))
        for matrix in selection.matrices:
            if self.affine.padded(matrix.in_features) != matrix.in_features:
                self._check_indivisible(matrix)
            if matrix.role == "embedding":
                _check_plain_embedding(model, matrix)
        return selection.matrices, selection.left_out

    def _check_indivisible(self, matrix: Matrix) -> None:
        if self.on_indivisible == "pad":
            return
        sizes = range(SMALLEST_GROUP, LARGEST_GROUP + 1)
        fitting = [str(size) for size in sizes if matrix.in_features % size == 0]
        raise ConfigError(
            f"layer {matrix.name}: its width {matrix.in_features} is not a multiple of group_size "
            f"{self.group_size}; group sizes that fit it: {', '.join([*fitting, '-1'])} (-1 is per "
            "channel); or set on_indivisible=pad"
        )

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Replace the matrices by packed ones and write the model into folder `into`.

        Raises:
            ConfigError: a weight is not finite, or see `select`.
        """
        report = self.store(
            model,
            into,
            lambda matrix: quantize(matrix.name, weight_of(model, matrix), self.affine),
        )
        notes = [*report.notes, TERNARY] if self.symmetric and self.bits == 2 else report.notes
        return dataclasses.replace(report, notes=notes)

    def store(
        self, model: nn.Module, into: Path, rounded: Callable[[Matrix], Quantized]
    ) -> QuantizeReport:
        """Do what `quantize` does with the codes that `rounded` gives for each matrix.

        Raises:
            ConfigError: a weight is not finite, or see `select`.
        """
        matrices, left_out = self.select(model)
        notes = self._notes(model, matrices)
        if is_tied(model) and any(matrix.role != "block" for matrix in matrices):
            # Both are stored from here on, so the artefact must not tie them again.
            cast(Any, model).config.tie_word_embeddings = False
        layers: dict[str, dict[str, Any]] = {}
        subnormal = 0
        for matrix in matrices:
            quantized = rounded(matrix)
            subnormal += quantized.subnormal_scales
            module = self._module(model, matrix, quantized)
            layers[matrix.name] = module.facts()
            replace(model, matrix, module)
        for name, parameter in model.named_parameters():
            check_finite(name, parameter)
        if subnormal:
            notes.append(
                f"{subnormal} scales are below the smallest normal number of {self.scale_dtype} "
                "and have fewer digits; scale_dtype=float32 would hold them"
            )
        artefacts.save(model, into, layers)
        stored = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, stored, left_out, notes)

    def modules(
        self, model: nn.Module, matrices: Sequence[Matrix], calibration: Tensor | None
    ) -> Mapping[str, nn.Module]:
        """Return name -> packed module of each of `matrices`; `model` is left as it was."""
        found = {}
        for matrix in matrices:
            quantized = quantize(matrix.name, weight_of(model, matrix), self.affine)
            found[matrix.name] = self._module(model, matrix, quantized)
        return found

    def _module(self, model: nn.Module, matrix: Matrix, quantized: Quantized) -> QuantizedModule:
        """Return the packed module for `matrix`; its bias is stored as in the checkpoint."""
        bias = bias_of(model, matrix)
        if bias is not None:
            bias = bias.to(artefacts.checkpoint_dtype(model))
        layout = Layout.of(matrix, self.affine)
        if quantized.codes.ndim == 3:
            owner = model.get_submodule(matrix.name.rpartition(".")[0])
            transposed = stack_is_transposed(owner)
            layout = dataclasses.replace(layout, kind="experts", transposed=transposed)
        if bias is not None:
            layout = dataclasses.replace(layout, bias=str(bias.dtype).removeprefix("torch."))
        return module_of(layout).fill(quantized, bias)

    def _notes(self, model: nn.Module, matrices: list[Matrix]) -> list[str]:
        """Return what a reader of the row must know of `matrices` beside the options."""
        notes = [] if self.activation_bits is None else [rtn_activations.NOTE]
        padded = {
            (matrix.in_features, self.affine.padded(matrix.in_features))
            for matrix in matrices
            if self.affine.padded(matrix.in_features) != matrix.in_features
        }
        notes += [
            f"rows of {width} inputs are padded to {stored} for group_size {self.group_size}; "
            "the padding is stored and counted"
            for width, stored in sorted(padded)
        ]
        roles = sorted({matrix.role for matrix in matrices} - {"block"})
        if roles and is_tied(model):
            notes.append(
                f"head and embedding were one parameter; quantizing the {' and the '.join(roles)} "
                "unties them, and both are stored"
            )
        return notes

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for `hardware` on its packed kernels where it has them."""
        return self._load(artefact, hardware, packed=True)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for `hardware` with every matrix dequantized at each call, to compare with."""
        return self._load(artefact, hardware, packed=False)

    def _load(self, artefact: Path, hardware: Hardware, packed: bool) -> Engine:
        build = empty if self.activation_bits is None else rtn_activations.build
        return load_engine(artefact, hardware, packed, build)


def _check_plain_embedding(model: nn.Module, matrix: Matrix) -> None:
    kind = type(model.get_submodule(matrix.name))
    if kind is not nn.Embedding:
        raise ConfigError(
            f"embedding {matrix.name} is a {kind.__name__}, which does more than look rows up; "
            "set method.embeddings=false for this model"
        )
