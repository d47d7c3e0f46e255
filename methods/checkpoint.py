"""A ready-made quantized checkpoint: loaded and measured as it is.

What it is stands in its own `config.json` (`quantization_config`): GPTQ and AWQ run through
GPTQModel, bitsandbytes and compressed-tensors through transformers, HQQ through hqq; or it is one
GGUF file, which llama.cpp runs. Nothing is quantized here, and nothing is guessed from a name.

With `kernel: quantbench` a GPTQ or AWQ checkpoint is stored as this project stores matrices,
without loss, and its own kernels run it (`methods.repack`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from methods.files import opened, read_object, take, whole
from methods.gguf import FILE as GGUF_FILE
from methods.gguf import load_dequantized as gguf_dequantized
from methods.gguf import load_file as gguf_load
from methods.layers import Scope, select
from methods.options import refuse_emulated
from methods.packed import load_engine
from methods.patterns import check_patterns

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
        ConfigError: it is not quantized, or quantized as nothing here can run, or its
            configuration says something that cannot be.
    """
    if (folder / GGUF_FILE).is_file():
        return Scheme("gguf", None, None)
    stated = read_object(folder / "config.json").get("quantization_config")
    if stated is not None and not isinstance(stated, dict):
        raise ConfigError(f"the quantization_config of {folder} is no object")
    if stated is None and not any((folder / name).is_file() for name in gptq_format.CONFIG_FILES):
        raise ConfigError(
            "method=checkpoint measures checkpoints that are quantized already, and this one is "
            "not (no quantization_config in its config.json); choose a method that quantizes it"
        )
    said: Mapping[str, Any] = stated or {}
    kind = str(said.get("quant_method")) if said else "gptq"
    if kind not in LOADERS:
        known = ", ".join(LOADERS)
        raise ConfigError(
            f"the checkpoint is quantized as {kind!r:.60}; method=checkpoint runs {known}"
        )
    if kind == "bitsandbytes":
        sizes = bitsandbytes_engine.group_sizes(folder)
        return Scheme(kind, 8.0 if sizes == {-1} else 4.0, sizes.pop() if len(sizes) == 1 else None)
    if kind == "compressed-tensors":
        return _compressed_scheme(said)
    if kind == "hqq":
        params = _objects(_objects(said, "quant_config"), "weight_quant_params")
        return Scheme(kind, *_stated(params, "nbits", "group_size"))
    found = gptq_format.scheme_of(folder)
    return Scheme(found.kind, float(found.bits), found.group_size)


def _compressed_scheme(stated: Mapping[str, Any]) -> Scheme:
    check_patterns("ignore of the quantization_config", stated.get("ignore"))
    bits, sizes = set(), set()
    named = _objects(stated, "config_groups")
    for name in named:
        group = _objects(named, name)
        check_patterns(f"targets of {name!r:.40}", group.get("targets"))
        weights = _objects(group, "weights")
        width, size = _stated(weights, "num_bits", "group_size")
        bits.add(width)
        sizes.add(-1 if weights.get("strategy") == "channel" else size)
    return Scheme(
        "compressed-tensors",
        bits.pop() if len(bits) == 1 else None,
        sizes.pop() if len(sizes) == 1 else None,
    )


def _objects(stated: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object under `key`, an empty one where there is none."""
    found = stated.get(key)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"the quantization_config of the checkpoint has {key!r:.40} as no object")
    return found or {}


def _stated(params: Mapping[str, Any], bits: str, size: str) -> tuple[float | None, int | None]:
    """Return (bits, group size) as `params` state them; None where they do not."""
    width, group = params.get(bits), params.get(size)
    if width is not None and not whole(width, 1, 16):
        raise ConfigError(f"the quantization_config says {bits}={width!r:.40}; it must be 1 to 16")
    if group is not None and group != -1 and not whole(group, 1, gptq_format.LARGEST_GROUP):
        raise ConfigError(f"the quantization_config says {size}={group!r:.40}; it must be above 0")
    return None if width is None else float(width), None if group is None else int(group)


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
        with opened(path) as tensors:
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
        name: _width(name, dtype) * math.prod(shape)
        for name, (dtype, shape) in stored.items()
        if name.startswith(f"{matrix.name}.") and name != f"{matrix.name}.bias"
    }


def _width(name: str, dtype: str) -> int:
    if dtype not in WIDTHS:
        raise ConfigError(f"the checkpoint stores {name} as {dtype}, whose size is not known here")
    return WIDTHS[dtype]


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
