"""A ready-made quantized checkpoint: loaded and measured as it is.

What it is stands in its own `config.json` (`quantization_config`): GPTQ and AWQ run through
GPTQModel, bitsandbytes and compressed-tensors through transformers, HQQ through hqq; or it is one
GGUF file, which llama.cpp runs. Nothing is quantized here, and nothing is guessed from a name.

With `kernel: quantbench` a GPTQ or AWQ checkpoint is stored as this project stores matrices,
without loss, and its own kernels run it (`methods.repack`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import (
    bitsandbytes_engine,
    compressed_engine,
    gguf_checkpoint,
    gptq_format,
    gptqmodel_engine,
    hqq,
    hqq_checkpoint,
    repack,
)
from methods.base import Engine, Hardware, Matrix, QuantizeReport
from methods.files import take
from methods.gguf import FILE as GGUF_FILE
from methods.gguf import load_dequantized as gguf_dequantized
from methods.gguf import load_file as gguf_load
from methods.layers import Scope, select
from methods.options import refuse_emulated
from methods.packed import load_engine

Loader = Callable[[Path, Hardware], Engine]

LOADERS: Mapping[str, Loader] = {
    "gptq": gptqmodel_engine.load,
    "awq": gptqmodel_engine.load,
    "bitsandbytes": bitsandbytes_engine.load,
    "compressed-tensors": compressed_engine.load,
    "hqq": hqq.load,
    "gguf": gguf_load,
}
DEQUANTIZED_LOADERS: Mapping[str, Loader] = {
    "gptq": gptqmodel_engine.load_dequantized,
    "awq": gptqmodel_engine.load_dequantized,
    "bitsandbytes": bitsandbytes_engine.load_dequantized,
    "compressed-tensors": compressed_engine.load_dequantized,
    "hqq": hqq.load_dequantized,
    "gguf": gguf_dequantized,
}
REPACKED = ("gptq", "awq")
PATH_TOLERANCE = 0.2
"""The largest of those of the methods that make such checkpoints; see there."""

FLOATS = ("F64", "F32", "F16", "BF16")
FILES = ("config.json", "generation_config.json", *gptq_format.CONFIG_FILES, "*.safetensors*")


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint says of itself; `bits` and `group_size` are None where it has several."""

    kind: str
    bits: float | None
    group_size: int | None


def scheme_of(folder: Path) -> Scheme:
    """Return the scheme of the checkpoint in `folder`, as its own configuration states it.

    Raises:
        ConfigError: it is not quantized, or quantized as nothing here can run.
    """
    if (folder / GGUF_FILE).is_file():
        return Scheme("gguf", None, None)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated = config.get("quantization_config")
    if stated is None and not any((folder / name).is_file() for name in gptq_format.CONFIG_FILES):
        raise ConfigError(
            "method=checkpoint measures checkpoints that are quantized already, and this one is "
            "not (no quantization_config in its config.json); choose a method that quantizes it"
        )
    kind = str(stated.get("quant_method")) if stated else "gptq"
    if kind not in LOADERS:
        raise ConfigError(
            f"the checkpoint is quantized as {kind!r}; method=checkpoint runs {', '.join(LOADERS)}"
        )
    if kind == "bitsandbytes":
        sizes = bitsandbytes_engine.group_sizes(folder)
        return Scheme(kind, 8.0 if sizes == {-1} else 4.0, sizes.pop() if len(sizes) == 1 else None)
    if kind == "compressed-tensors":
        return _compressed_scheme(stated)
    if kind == "hqq":
        params = stated.get("quant_config", {}).get("weight_quant_params", {})
        bits, size = params.get("nbits"), params.get("group_size")
        return Scheme(kind, None if bits is None else float(bits), size)
    found = gptq_format.scheme_of(folder)
    return Scheme(found.kind, float(found.bits), found.group_size)


def _compressed_scheme(stated: Mapping[str, Any]) -> Scheme:
    groups = [group["weights"] for group in stated.get("config_groups", {}).values()]
    bits = {float(weights["num_bits"]) for weights in groups}
    sizes = {-1 if w.get("strategy") == "channel" else w.get("group_size") for w in groups}
    return Scheme(
        "compressed-tensors",
        bits.pop() if len(bits) == 1 else None,
        sizes.pop() if len(sizes) == 1 else None,
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that somebody else has quantized; `model.path` or `model.id` names it.

    Attributes:
        kernel: library: whose format it is runs it; quantbench: GPTQ and AWQ are repacked.
    """

    name: str
    kernel: str = "library"

    needs_calibration: ClassVar[bool] = False
    takes_weights: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        repack.check_kernel(self.name, self.kernel)

    @property
    def bits(self) -> float | None:
        """Only the checkpoint can tell: the artefact's manifest says it."""
        return None

    @property
    def group_size(self) -> int | None:
        """As `bits`."""
        return None

    def check(self, hardware: Hardware) -> None:
        """Refuse what no kernel of this project computes; the rest shows in the checkpoint."""
        if self.kernel == "quantbench":
            refuse_emulated(hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """Refuse: the size of a checkpoint is that of its files."""
        raise ConfigError(
            "suite=size_only computes sizes from an architecture, and a checkpoint's is that of its"
            " files; choose another suite, or the method that made it"
        )

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the matrices that a checkpoint may hold quantized, the head among them."""
        selection = select(model, Scope(head=True))
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Refuse: see `adopt`."""
        raise ConfigError("method=checkpoint quantizes nothing; it takes a quantized checkpoint")

    def adopt(self, checkpoint: Path, model: nn.Module, into: Path) -> QuantizeReport:
        """Put a GGUF file, or the files of a folder, into `into`; say what they hold.

        Raises:
            ConfigError: the checkpoint is not quantized, or holds other matrices than `model` has.
        """
        kind = "gguf" if checkpoint.is_file() else scheme_of(checkpoint).kind
        if self.kernel == "quantbench" and kind not in REPACKED:
            raise ConfigError(
                f"method.kernel=quantbench runs checkpoints of {' and '.join(REPACKED)}, and this "
                f"one is {kind}; set method.kernel=library"
            )
        if checkpoint.is_file():
            return gguf_checkpoint.adopt(checkpoint, model, into)
        scheme = scheme_of(checkpoint)
        self._take(checkpoint, scheme.kind, model, into)
        matrices, _ = self.select(model)
        stored = _stored(into)
        quantized = [matrix for matrix in matrices if _is_quantized(matrix, stored)]
        if not quantized:
            raise ConfigError(
                f"{checkpoint} says it is quantized as {scheme.kind}, but no matrix of its decoder "
                "blocks is; the config.json of another model may lie beside these weights"
            )
        spared = tuple(m.name for m in matrices if m.role == "block" and m not in quantized)
        head = any(matrix.role == "head" for matrix in quantized)
        left_out = select(model, Scope(head=head, keep=spared)).left_out
        bits = sum(size for matrix in quantized for size in _sizes(matrix, stored).values())
        note = f"a ready-made checkpoint, quantized as {scheme.kind}; not quantized here"
        notes = [note, *repack.notes(self.kernel, scheme.kind)]
        return QuantizeReport(quantized, bits, left_out, notes, scheme.bits, scheme.group_size)

    def _take(self, checkpoint: Path, kind: str, model: nn.Module, into: Path) -> None:
        """Put the files of the folder `checkpoint` into `into`, or what they are stored as here."""
        if self.kernel == "quantbench":
            repack.repack(checkpoint, into)
            return
        if kind == "hqq":
            # In the container that method=hqq writes: no library reads these folders any more.
            hqq_checkpoint.adopt(checkpoint, model, into)
        for pattern in FILES:
            for path in sorted(checkpoint.glob(pattern)):
                if kind != "hqq" or path.suffix == ".json":
                    take(path, into / path.name)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with the library whose format the checkpoint has, or with our kernels."""
        if self.kernel == "quantbench":
            return load_engine(artefact, hardware, build=repack.build)
        return LOADERS[scheme_of(artefact).kind](artefact, hardware)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with every matrix decoded into floats, to compare with."""
        if self.kernel == "quantbench":
            return load_engine(artefact, hardware, packed=False, build=repack.build)
        return DEQUANTIZED_LOADERS[scheme_of(artefact).kind](artefact, hardware)


def _stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return tensor name -> (stored type, shape) of the safetensors files in `folder`."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                part = tensors.get_slice(name)
                found[name] = (part.get_dtype(), list(part.get_shape()))
    return found


def _is_quantized(matrix: Matrix, stored: Mapping[str, tuple[str, list[int]]]) -> bool:
    """Whether `matrix` is stored, and not as plain floats."""
    dtype, _ = stored.get(f"{matrix.name}.weight", ("", []))
    return dtype not in FLOATS and bool(_sizes(matrix, stored))


def _sizes(matrix: Matrix, stored: Mapping[str, tuple[str, list[int]]]) -> dict[str, int]:
    """Return tensor name -> bits of what is stored for `matrix`, its bias left out."""
    return {
        name: WIDTHS[dtype] * math.prod(shape)
        for name, (dtype, shape) in stored.items()
        if name.startswith(f"{matrix.name}.") and name != f"{matrix.name}.bias"
    }


WIDTHS = {
    "F64": 64,
    "I64": 64,
    "F32": 32,
    "I32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
}
