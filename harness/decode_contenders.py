"""The engines that `harness.decode_bench` compares, and how each is made of a shape.

Every engine comes from an artefact: random weights are quantized by the method, written, loaded
again and the files removed, so what is timed is what a cell of the harness times. Where a card has
room for the float32 weights beside what it holds, they are made and quantized there.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from harness.hardware import Hardware
from harness.load import meta_model, random_model
from harness.measures.memory import free_bytes
from harness.measures.size import bytes_of_matrix, tensor_bytes
from harness.shape_model import ShapeModel
from methods.base import Engine, KernelUse, Method, Storing
from methods.bnb_4bit import Bnb4Bit
from methods.gguf import Gguf
from methods.layers import end_names, is_tied
from methods.rtn import RTN
from methods.unquantized import Unquantized

FLOAT_BYTES = 4
ROOM = 1.5
"""Times the float32 weights: quantizing one matrix needs room beside the model."""


@dataclass(frozen=True)
class Contender:
    """An engine by name.

    Attributes:
        make: returns its method; the type of the activations is asked for where it matters.
        dtype: type of the activations; None: the baseline's.
        packages: have to be importable.
        ours: whether it is this project's own, whose failure is a failure of the bench.
    """

    name: str
    make: Callable[[str], Method]
    dtype: str | None = None
    packages: tuple[str, ...] = ()
    ours: bool = True

    def missing(self) -> str | None:
        """Return why it cannot take part, None where it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None


@dataclass(frozen=True)
class Facts:
    """What is known of an engine before it is timed.

    Attributes:
        held_bytes: of its weights in memory.
        read_bytes: of stored weights that one token reads: all but the embedding.
        path: how a token is decoded.
        kernels: what runs the matrices, with their share of the quantized weights.
        quantize_seconds, load_seconds: from weights to files, from files to engine.
    """

    held_bytes: int
    read_bytes: int
    path: str
    kernels: str
    quantize_seconds: float
    load_seconds: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.quantize_seconds + self.load_seconds


def _unquantized(dtype: str, activations: str) -> Method:
    return Unquantized(dtype, dtype)


def _rtn(
    bits: int,
    group_size: int,
    activations: str,
    *,
    symmetric: bool = True,
    head: bool = False,
    rounded: bool = False,
) -> Method:
    return RTN(
        "rtn",
        bits,
        group_size,
        symmetric=symmetric,
        head=head,
        activation_bits=8 if rounded else None,
        on_indivisible="pad",
    )


def _nf4(activations: str) -> Method:
    return Bnb4Bit("nf4", "nf4", compute_dtype=activations)


def _gguf(kind: str, activations: str) -> Method:
    # Whether it needs calibration depends on its options, which the protocol does not know.
    return cast(Method, Gguf(f"gguf_{kind}", kind))


# Two bits have zero points: symmetric, they would be three values.
OURS = (
    Contender("rtn w8", partial(_rtn, 8, -1)),
    Contender("rtn w4 g128", partial(_rtn, 4, 128)),
    Contender("rtn w3 g128", partial(_rtn, 3, 128)),
    Contender("rtn w2 g64", partial(_rtn, 2, 64, symmetric=False)),
    Contender("rtn w4 g128 zeros", partial(_rtn, 4, 128, symmetric=False)),
    Contender("rtn w8a8", partial(_rtn, 8, -1, rounded=True)),
)
NF4 = Contender("nf4", _nf4, packages=("bitsandbytes",), ours=False)
LLAMACPP = tuple(
    Contender(f"llama.cpp {kind}", partial(_gguf, kind), packages=("llama_cpp", "gguf"), ours=False)
    for kind in ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
)

CONTENDERS: dict[str, tuple[Contender, ...]] = {
    "cpu": (
        Contender("bf16", partial(_unquantized, "bfloat16"), "bfloat16"),
        *OURS,
        Contender("rtn w4a8 g128", partial(_rtn, 4, 128, rounded=True)),
        # llama.cpp quantizes the head, too.
        Contender("rtn w8 with head", partial(_rtn, 8, -1, head=True)),
        Contender("rtn w4 g128 with head", partial(_rtn, 4, 128, head=True)),
        NF4,
        *LLAMACPP,
    ),
    "cuda": (
        Contender("fp16", partial(_unquantized, "float16"), "float16"),
        Contender("bf16", partial(_unquantized, "bfloat16"), "bfloat16"),
        *OURS,
        NF4,
    ),
}
"""The first of a device is the baseline; its type of activations is the others'."""


def build(contender: Contender, source: ShapeModel, hardware: Hardware) -> tuple[Engine, Facts]:
    """Return the engine of a contender for `source`, and what is known of it.

    Raises:
        ConfigError: the method refuses the shape or the hardware.
    """
    hardware = replace(hardware, compute_dtype=contender.dtype or hardware.compute_dtype)
    method = contender.make(hardware.compute_dtype)
    method.check(hardware)
    with tempfile.TemporaryDirectory() as folder:
        artefact = Path(folder) / "artefact"
        model = random_model(source, _place(source, hardware))
        embedding = embedding_apart(model)
        start = time.perf_counter()
        method.quantize(model, None, None, artefact)
        quantized = time.perf_counter()
        del model
        before = _allocated(hardware)
        engine = method.load(artefact, hardware)
        loaded = time.perf_counter()
        stored = tensor_bytes(engine, artefact)
        held = _allocated(hardware) - before or held_bytes(engine)
    read = sum(stored.values())
    if embedding is not None:
        read -= bytes_of_matrix(embedding, stored, {})
    facts = Facts(
        held_bytes=held,
        read_bytes=read,
        path=decode_path(engine),
        kernels=kernel_summary(engine.kernels()),
        quantize_seconds=quantized - start,
        load_seconds=loaded - quantized,
    )
    return engine, facts


def _place(source: ShapeModel, hardware: Hardware) -> str:
    """Return where the float32 weights are made: on the card where they fit."""
    if hardware.device == "cpu":
        return "cpu"
    wanted = ROOM * FLOAT_BYTES * sum(p.numel() for p in meta_model(source.config).parameters())
    torch.cuda.empty_cache()
    return "cuda" if wanted <= free_bytes(hardware) else "cpu"


def _allocated(hardware: Hardware) -> int:
    return int(torch.cuda.memory_allocated()) if hardware.device == "cuda" else 0


def embedding_apart(model: Any) -> str | None:
    """Return the name of the embedding where the head is stored beside it, else None."""
    return None if is_tied(model) else end_names(model)["embedding"]


def held_bytes(engine: Engine) -> int:
    """Return the bytes of an engine's weights on a processor.

    Of a PyTorch engine every storage once; of one that says what it stores, that.
    """
    model = getattr(engine, "model", None)
    if isinstance(model, nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())
    return sum(engine.stored_bytes().values()) if isinstance(engine, Storing) else 0


def decode_path(engine: Engine) -> str:
    """Return what decodes a token, and why nothing faster does, in the engine's own words."""
    return str(getattr(engine, "decoding", engine.runtime))


def kernel_summary(uses: list[KernelUse]) -> str:
    """Return the kernels of an engine, most weights first, each with state and share."""
    weights: dict[str, int] = {}
    for use in uses:
        name = f"{use.kernel} ({use.execution})"
        weights[name] = weights.get(name, 0) + use.weights
    total = sum(weights.values())
    if len(weights) == 1:
        return next(iter(weights))
    ordered = sorted(weights.items(), key=lambda entry: -entry[1])
    return "; ".join(f"{count / total:.0%} {name}" for name, count in ordered)
