"""Kernels on the card: source to launch, and a command that compiles all of them without a card.

`kernel` compiles a source for the card that torch is on (`kernels.compiler`), loads it, and gives
an object that launches on torch's current stream. A launch allocates nothing on the card and waits
for nothing, so it can be captured in a CUDA graph; loading cannot, so run an op once before.

`python -m kernels.build` compiles all of `kernels.variants` for each architecture, and fails where
something does not compile or spills.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.compiler import SOURCES, BuildError, Compiled, compile_source, compiler_version
from kernels.errors import ConfigError
from kernels.registers import Resources, Row, table
from kernels.variants import ARCHITECTURES, Variant, variants

__all__ = ["BuildError", "Compiled", "Kernel", "Resources", "compile_source", "kernel"]

Argument = Tensor | int | float | None

DEFAULT_SHARED_BYTES = 48 << 10
"""Dynamic shared memory of a block that a kernel gets without asking for more."""

POINTER, INTEGERS, FLOATS = (
    ctypes.c_void_p,
    {4: ctypes.c_int, 8: ctypes.c_longlong},
    {4: ctypes.c_float, 8: ctypes.c_double},
)


class DriverError(RuntimeError):
    """The driver refused a call: for which kernel, which call, and its reason."""


class Kernel:
    """A loaded kernel of one card.

    Attributes:
        name: source and function.
        device: torch's index of the card.
        sizes: bytes of each parameter, as the driver reads them from the image.
        resources: what the kernel takes.
    """

    def __init__(
        self,
        name: str,
        device: int,
        function: Any,
        sizes: tuple[int, ...],
        resources: Resources,
    ) -> None:
        self.name, self.device, self.sizes, self.resources = name, device, sizes, resources
        self._function = function
        self._shared_bytes = DEFAULT_SHARED_BYTES - resources.shared_bytes

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        *args: Argument,
    ) -> None:
        """Put the kernel on torch's current stream of its card.

        `grid` and `block` are (x, y, z); `shared_bytes` is dynamic shared memory. A tensor is
        passed as its address, None as a null pointer, an int as the 4 or 8 bytes that the parameter
        has, a float likewise. Tensors have to live until the stream is past the kernel, as those of
        torch's own ops do.

        Raises:
            TypeError: the arguments do not fit the kernel's parameters.
            DriverError: the driver refuses.
        """
        packed = pack_arguments(self.name, self.sizes, args)
        self._make_current()
        if shared_bytes > self._shared_bytes:
            limit = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call(self.name, "cuFuncSetAttribute", self._function, limit, shared_bytes)
            self._shared_bytes = shared_bytes
        stream = torch.cuda.current_stream(self.device).cuda_stream
        _call(
            self.name,
            "cuLaunchKernel",
            self._function,
            *grid,
            *block,
            shared_bytes,
            stream,
            packed,
            0,
        )

    def _make_current(self) -> None:
        # A thread in which torch has made no call of its own yet has no context of the driver's.
        if not int(_call(self.name, "cuCtxGetCurrent")):
            _use_card(self.name, self.device)


def pack_arguments(
    name: str, sizes: Sequence[int], args: Sequence[Argument]
) -> tuple[tuple[int | float, ...], tuple[type[Any], ...]]:
    """Return values and C types of `args` for parameters of `sizes` bytes.

    Raises:
        TypeError: too many or too few, or one of them does not fit its parameter.
    """
    if len(args) != len(sizes):
        raise TypeError(f"{name} takes {len(sizes)} arguments, not {len(args)}")
    values: list[int | float] = []
    types: list[type[Any]] = []
    for place, (size, value) in enumerate(zip(sizes, args, strict=True)):
        kind: type[Any] | None
        if value is None or isinstance(value, Tensor):
            kind = POINTER if size == ctypes.sizeof(POINTER) else None
            values.append(0 if value is None else value.data_ptr())
        elif isinstance(value, int):
            kind = INTEGERS.get(size)
            # A larger one would be cut in silence.
            if kind is not None and not -(1 << (8 * size - 1)) <= value < 1 << (8 * size - 1):
                kind = None
            values.append(value)
        else:
            kind = FLOATS.get(size)
            values.append(value)
        if kind is None:
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"argument {place} of {name} has {size} bytes, which {shown} does not fit"
            )
        types.append(kind)
    return tuple(values), tuple(types)


def kernel(path: str, function: str, defines: Mapping[str, int | str]) -> Kernel:
    """Return the kernel `function` of the source `path` for the card torch is on, loaded once.

    `path` is relative to `kernels/cuda`, or absolute.

    Raises:
        ConfigError: there is no card, or no compiler.
        BuildError: the source does not compile, or has no such kernel.
    """
    if not torch.cuda.is_available():
        raise ConfigError(f"{path} needs a CUDA card, and torch sees none")
    return _kernel(torch.cuda.current_device(), path, function, tuple(sorted(defines.items())))


def architecture(capability: tuple[int, int]) -> str:
    """Return the architecture compiled for a card: (8, 6) -> `sm_86`.

    No kernel needs what a card has only under a suffix (`sm_90a`: wgmma).
    """
    return f"sm_{capability[0]}{capability[1]}"


@cache
def _kernel(
    device: int, path: str, function: str, defines: tuple[tuple[str, int | str], ...]
) -> Kernel:
    name = f"{Path(path).name}:{function}"
    compiled, library = _library(device, path, defines)
    if function not in compiled.functions:
        raise BuildError(f"{path} has no kernel {function}, only {', '.join(compiled.functions)}")
    handle = _call(name, "cuLibraryGetKernel", library, function.encode())
    loaded = _call(name, "cuKernelGetFunction", handle)
    return Kernel(name, device, loaded, _parameter_sizes(handle), compiled.functions[function])


@cache
def _library(
    device: int, path: str, defines: tuple[tuple[str, int | str], ...]
) -> tuple[Compiled, Any]:
    """Compile a source and load it on a card, once for all its kernels."""
    file = SOURCES / path
    source = file.read_text(encoding="utf-8")
    arch = architecture(torch.cuda.get_device_capability(device))
    try:
        compiled = compile_source(file.name, source, arch, dict(defines), file.parent)
    except BuildError as error:
        error.add_note(f"The card is {torch.cuda.get_device_name(device)}.")
        raise
    _use_card(path, device)
    library = _call(path, "cuLibraryLoadData", compiled.image, [], [], 0, [], [], 0)
    return compiled, library


def _use_card(name: str, device: int) -> None:
    """Make the context that torch uses on a card the current one of this thread."""
    context = _call(name, "cuDevicePrimaryCtxRetain", _call(name, "cuDeviceGet", device))
    _call(name, "cuCtxSetCurrent", context)


def _parameter_sizes(handle: Any) -> tuple[int, ...]:
    """Return the bytes of each parameter; the driver answers `invalid value` past the last."""
    driver = _driver()
    sizes: list[int] = []
    while True:
        result, _, size = driver.cuKernelGetParamInfo(handle, len(sizes))
        if result != driver.CUresult.CUDA_SUCCESS:
            return tuple(sizes)
        sizes.append(int(size))


@cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _call(name: str, function: str, *args: Any) -> Any:
    """Call the driver and return what it gives besides its result code.

    Raises:
        DriverError: the result is not success.
    """
    driver = _driver()
    result, *values = getattr(driver, function)(*args)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{name}: {function} failed with {result.name}")
    return values[0] if values else None


def build_one(variant: Variant, arch: str, folder: Path = SOURCES) -> Row:
    """Compile one variant for one architecture."""
    found, error = None, ""
    try:
        source = (folder / variant.file).read_text(encoding="utf-8")
        compiled = compile_source(variant.file, source, arch, variant.defines, folder)
        found = compiled.functions.get(variant.function)
        error = "" if found else f"{variant.file} has no kernel {variant.function}"
    except BuildError as failure:
        error = str(failure)
    return Row(variant.file, variant.function, variant.defines, arch, found, error)


def build_all(pairs: Sequence[tuple[Variant, str]], jobs: int) -> list[Row]:
    """Compile variants, each for its architecture, by `jobs` processes."""
    if jobs == 1:
        return [build_one(variant, arch) for variant, arch in pairs]
    # Spawned, because a fork of a process in which torch has threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        chunk = max(1, len(pairs) // (4 * jobs))
        return list(pool.map(build_one, *zip(*pairs, strict=True), chunksize=chunk))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile every kernel, print the table, and return 1 if something fails or spills."""
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description=main.__doc__)
    parser.add_argument("--output", type=Path, help="write the table into this file too")
    parser.add_argument(
        "--arch",
        choices=[*ARCHITECTURES, "card"],
        help="for this architecture only; all by default",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    asked = parser.parse_args(arguments)
    try:
        arch = _card() if asked.arch == "card" else asked.arch
        pairs = [
            (variant, found)
            for variant in variants()
            for found in variant.architectures
            if arch in (None, found)
        ]
        text = table(rows := build_all(pairs, max(1, asked.jobs)), compiler_version())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(text, end="")
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(text, encoding="utf-8")
    for row in rows:
        if not row.sound:
            problem = row.error or f"{row.function} spills for {row.arch} with {row.shown}"
            print(problem, file=sys.stderr)
    if not rows:
        print(f"there is no kernel for {arch}", file=sys.stderr)
    return 0 if rows and all(row.sound for row in rows) else 1


def _card() -> str:
    """Return the architecture of the card torch is on."""
    if not torch.cuda.is_available():
        raise ConfigError("--arch card needs a CUDA card, and torch sees none")
    return architecture(torch.cuda.get_device_capability())


if __name__ == "__main__":
    sys.exit(main())
