"""GGUF: the model as one file that llama.cpp runs, quantized by llama.cpp itself.

The model is exported in float32 (`methods.gguf_export`), quantized by llama.cpp's own quantizer,
and run by llama.cpp in this process. `type` is a file type as `llama-quantize` takes it. Head and
embedding are quantized too, as llama.cpp does; a tied pair is one tensor. Vectors, and GPT-2's
position embeddings, stay float32.

Which tensor gets which type is llama.cpp's choice. `methods.gguf_types` says it beforehand, so that
sizes can be computed for models that are not here and a fallback is said before anything is
quantized; a file in which a matrix has another type than that is refused.

K-quants and the IQ and TQ types below four bits keep blocks of 256 weights. Where those do not
divide a row, llama.cpp stores the matrix in a type with blocks of 32, and where those do not
either, in F16.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.base import Calibration, Engine, Hardware, KernelUse, Matrix, QuantizeReport
from methods.engine import TorchEngine
from methods.gguf_names import check_structure, gguf_name
from methods.gguf_types import (
    FILE_TYPES,
    FLOATS,
    IGNORE_IMPORTANCE,
    NEED_IMPORTANCE,
    TENSOR_TYPES,
    Choice,
    Planned,
    Shape,
    bits_of,
    fitting,
    plan,
)
from methods.layers import Scope, check_finite, is_tied, select, weight_of
from methods.library import drop_weights, require
from methods.options import need_calibration, require_flags

FILE = "model.gguf"
EXPORTED = ".float32.gguf"

PATH_TOLERANCE = 0.1
"""Largest difference of the logits of llama.cpp and of the same weights decoded by `gguf.quants`
in PyTorch, root mean square over that of the logits. llama.cpp rounds activations: 7e-7 for F32
weights, 6e-4 for F16, 4e-3 for BF16, 0.01 to 0.05 (TQ1_0) for the others, whose activations have
8 bits. Exchanged nibbles in 20 kB of a 4 MB file give 0.5 and more."""


class StoredDifferentlyError(RuntimeError):
    """llama.cpp stored a matrix in another type than this project says it does."""


@dataclass(frozen=True)
class TypedMatrix(Matrix):
    """A matrix, the tensor type it is stored in, and the one it would have in wider rows."""

    type: str = field(kw_only=True)
    wanted: str = field(kw_only=True)


@dataclass(frozen=True)
class Gguf:
    """One GGUF file, quantized and run by llama.cpp.

    Attributes:
        type: file type, one of `methods.gguf_types.FILE_TYPES`.
        pure: every matrix in the type's main tensor type, none in a better one.
        output_tensor_type: tensor type of the head; None: llama.cpp's choice.
        token_embedding_type: tensor type of the embedding; None: llama.cpp's choice.
        calibration: how much text an importance matrix is taken from, by which rounding is then
            weighted; None: no importance matrix, and no text is read.
    """

    name: str
    type: str
    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    calibration: Calibration | None = None

    path_tolerance: ClassVar[float] = PATH_TOLERANCE
    loadings: ClassVar[tuple[str, ...]] = ("mmap", "no_mmap")
    keeps_ties: ClassVar[bool] = True
    rest_dtype: ClassVar[str] = "float32"

    def __post_init__(self) -> None:
        _one_of("type", self.type, FILE_TYPES)
        for option in ("output_tensor_type", "token_embedding_type"):
            if getattr(self, option) is not None:
                _one_of(option, getattr(self, option), TENSOR_TYPES)
        require_flags("gguf", {"pure": self.pure})
        if self.calibration is None and self._must_have_importance:
            raise ConfigError(
                f"{self._must_have_importance} needs an importance matrix; use method=gguf_imatrix"
            )
        if self.calibration and self.type in IGNORE_IMPORTANCE and not self._must_have_importance:
            raise ConfigError(
                f"rounding to {self.type} does not look at an importance matrix; use method=gguf"
            )

    @property
    def _must_have_importance(self) -> str:
        """The first type that cannot do without an importance matrix, empty where all can."""
        if FILE_TYPES[self.type].needs_importance:
            return f"type {self.type}"
        for option in ("output_tensor_type", "token_embedding_type"):
            if getattr(self, option) in NEED_IMPORTANCE:
                return f"{option} {getattr(self, option)}"
        return ""

    @property
    def needs_calibration(self) -> bool:
        """Whether an importance matrix is used."""
        return self.calibration is not None

    @property
    def _main(self) -> str:
        return FILE_TYPES[self.type].main

    @property
    def bits(self) -> float | None:
        """Bits of a weight where every matrix has one type; None for llama.cpp's mixtures."""
        return float(TENSOR_TYPES[self._main].bits) if self._is_uniform else None

    @property
    def group_size(self) -> int | None:
        """Consecutive weights that share a scale, as `bits`."""
        return TENSOR_TYPES[self._main].group if self._is_uniform else None

    @property
    def _is_uniform(self) -> bool:
        """Whether llama.cpp was told to give every matrix the main type, or quantizes none."""
        own = self.output_tensor_type or self.token_embedding_type
        return own is None and (self.pure or self._main in FLOATS)

    @property
    def _choice(self) -> Choice:
        return Choice(
            self.type,
            self.pure,
            self.output_tensor_type,
            self.token_embedding_type,
            self.needs_calibration,
        )

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where llama.cpp is here, but was built without the device."""
        from methods.llamacpp_engine import check_device, is_installed

        # A missing library costs its own cells only, when they run.
        if hardware.device == "cuda" and is_installed():
            check_device(hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """Return the bits of the blocks; a matrix not from `select` is taken in the main type."""
        width = matrix.in_features
        stored = matrix.type if isinstance(matrix, TypedMatrix) else fitting(self._main, width)
        return matrix.count * bits_of(stored, matrix.out_features, width)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return all matrices with the types llama.cpp gives them; a tied head is the embedding's.

        Raises:
            ConfigError: the model has no form in GGUF, or an option no effect on it.
        """
        typed, left_out = self._typed(model)
        return [*typed], left_out

    def _typed(self, model: Any) -> tuple[list[TypedMatrix], list[tuple[str, int, str]]]:
        check_structure(model.config)
        shape = shape_of(model)
        self._refuse_without_effect(shape)
        selection = select(model, Scope(head=True, embeddings=True))
        choice, model_type = self._choice, model.config.model_type
        matrices = []
        for matrix in selection.matrices:
            if matrix.role == "head" and shape.tied:
                continue
            tensor = gguf_name(model_type, f"{matrix.name}.weight")
            matrices.append(_with(matrix, plan(choice, shape, tensor, matrix.in_features)))
        return matrices, selection.left_out

    def foresee(self, model: nn.Module) -> list[str]:
        """Return which rows of `model` (may be on meta) the type cannot take, and what comes in."""
        return fallbacks(self._typed(model)[0])

    def _refuse_without_effect(self, shape: Shape) -> None:
        """Refuse a type for the head where the head is the embedding and llama.cpp ignores it."""
        if self.output_tensor_type is None or not shape.tied:
            return
        if self.token_embedding_type is None and not self.pure and self._main not in FLOATS:
            return
        raise ConfigError(
            f"method.output_tensor_type is {self.output_tensor_type}, but this model's head is its "
            "embedding and has no type of its own; set method.token_embedding_type alone"
        )

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Export, quantize and hold the file against what was said of it.

        Raises:
            StoredDifferentlyError: llama.cpp chose another type for a matrix.
        """
        require("gguf", "gguf")
        require("llama_cpp", "gguf", "llama-cpp-python")
        matrices, left_out = self._typed(model)
        for matrix in matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        notes = mixture(matrices, self._main) + fallbacks(matrices)
        into.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(into)  # type: ignore[operator, union-attr]
        notes += self._write(model, tokenizer, calibration, into, matrices)
        check_stored(into / FILE, matrices)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        floats = {FLOATS.get(matrix.type) for matrix in matrices}
        unquantized = floats.pop() if len(floats) == 1 else None
        return QuantizeReport(matrices, bits, left_out, notes, unquantized=unquantized)

    def _write(
        self,
        model: Any,
        tokenizer: Any,
        calibration: Tensor | None,
        into: Path,
        matrices: Sequence[TypedMatrix],
    ) -> list[str]:
        """Write the file; return the exporter's notes."""
        from methods.gguf_export import export
        from methods.gguf_imatrix import importance
        from methods.gguf_quantize import quantize_file

        if all(matrix.type == self._main for matrix in matrices) and self._main in FLOATS:
            return export(model, tokenizer, into / FILE, FLOATS[self._main])
        means: dict[str, Tensor] = {}
        if self.needs_calibration:
            tokens = need_calibration("gguf", calibration)
            model_type = model.config.model_type
            # As llama.cpp's own tool: head and embedding only where their type needs it.
            watched = [m.name for m in matrices if m.role == "block" or m.type in NEED_IMPORTANCE]
            means = {
                gguf_name(model_type, f"{name}.weight"): mean
                for name, mean in importance(model, tokens, watched).items()
            }
        exported = into / EXPORTED
        try:
            notes = export(model, tokenizer, exported, "float32")
            drop_weights(model)
            quantize_file(exported, into / FILE, self._choice, means)
        finally:
            exported.unlink(missing_ok=True)
        return notes

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Map the file into memory and run it with llama.cpp."""
        return load_file(artefact, hardware)

    def load_as(self, way: str, artefact: Path, hardware: Hardware) -> Engine:
        """Load the file in the way `way`: mapped into memory, or read."""
        return load_file(artefact, hardware, use_mmap=way == "mmap")

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the weights, decoded to float32, into transformers' model; llama.cpp has no part."""
        return load_dequantized(artefact, hardware)


def load_file(artefact: Path, hardware: Hardware, use_mmap: bool = True) -> Engine:
    """Run the file in the folder `artefact` with llama.cpp; `use_mmap` maps it, else it is read.

    Raises:
        ConfigError: a library is missing, llama.cpp was built without the device, or the file is
            none that it takes.
    """
    require("gguf", "gguf")
    require("llama_cpp", "gguf", "llama-cpp-python")
    from methods.llamacpp_engine import open_engine
    from methods.llamacpp_kernels import uses_of

    path = artefact / FILE
    return open_engine(path, hardware, uses_of(path, hardware), use_mmap)


def load_dequantized(artefact: Path, hardware: Hardware) -> Engine:
    """Run the file's weights, decoded to float32 by `gguf.quants`, in transformers' model."""
    from methods import gguf_read

    model = gguf_read.load_dequantized(artefact / FILE).to(hardware.device)
    matrices = select(model, Scope(head=True, embeddings=True)).matrices
    uses = [
        KernelUse(m.name, "Linear", "gguf.quants + torch.linear", "dequantized", m.weights)
        for m in matrices
    ]
    return TorchEngine(model, hardware.device, uses)


def _one_of(option: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ConfigError(f"method.{option} is {value!r}; it must be one of {', '.join(known)}")


def _with(matrix: Matrix, planned: Planned) -> TypedMatrix:
    return TypedMatrix(
        matrix.name,
        matrix.role,
        matrix.out_features,
        matrix.in_features,
        matrix.count,
        type=planned.type,
        wanted=planned.wanted,
    )


def shape_of(model: Any) -> Shape:
    """Return what llama.cpp looks at of `model` (may be on meta) when it chooses types."""
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    # By the number of layers alone, except that Llama's first 65B shares no heads.
    size_70b = layers == 80 and (config.model_type == "qwen2" or heads != shared)
    return Shape(layers, heads // shared, is_tied(model), size_70b)


def check_stored(path: Path, matrices: Iterable[TypedMatrix]) -> None:
    """Raise StoredDifferentlyError where the file has other types than `matrices` say."""
    from methods.gguf_read import stored_tensors

    stored = stored_tensors(path)
    wrong = []
    for matrix in matrices:
        found = stored.get(f"{matrix.name}.weight")
        if found is None or found.type != matrix.type:
            kind = "missing" if found is None else found.type
            wrong.append(f"{matrix.name} {kind} instead of {matrix.type}")
    if wrong:
        raise StoredDifferentlyError(
            f"llama.cpp stored {len(wrong)} matrices otherwise than methods/gguf_types.py says: "
            f"{'; '.join(wrong[:3])}; the installed llama.cpp has other rules than that table"
        )


def mixture(matrices: Sequence[TypedMatrix], main: str) -> list[str]:
    """Return a sentence that names the matrices which llama.cpp wants in another type than `main`.

    Those that only their width keeps from it are `fallbacks`.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for matrix in matrices:
        if matrix.type == matrix.wanted != main:
            kind, layer = _split(matrix.name)
            found.setdefault((kind, matrix.type), []).append(layer)
    listed = [f"{_places(kind, layers)}: {better}" for (kind, better), layers in found.items()]
    return [f"matrices not in {main}: {'; '.join(listed)}"] if listed else []


def fallbacks(matrices: Sequence[TypedMatrix]) -> list[str]:
    """Return a sentence for each row width that is no whole number of a type's blocks."""
    found: dict[tuple[int, str, str], dict[str, list[str]]] = {}
    for matrix in matrices:
        if matrix.type != matrix.wanted:
            kind, layer = _split(matrix.name)
            places = found.setdefault((matrix.in_features, matrix.wanted, matrix.type), {})
            places.setdefault(kind, []).append(layer)
    return [
        f"rows of {width} weights are no whole blocks of {wanted} "
        f"({TENSOR_TYPES[wanted].block} weights), so llama.cpp stores {instead} for "
        + "; ".join(_places(kind, layers) for kind, layers in places.items())
        for (width, wanted, instead), places in found.items()
    ]


def _split(name: str) -> tuple[str, str]:
    """Return (`mlp.down_proj`, `3`) of a matrix in layer 3; (name, empty) outside the layers."""
    match = re.fullmatch(r".+?\.(\d+)\.(.+)", name)
    return (match[2], match[1]) if match else (name, "")


def _places(kind: str, layers: Sequence[str]) -> str:
    """Return `mlp.down_proj of layers 0, 2-5`."""
    if not layers[0]:
        return kind
    runs: list[list[int]] = []
    for layer in map(int, layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{kind} of layers {', '.join(shown)}"
