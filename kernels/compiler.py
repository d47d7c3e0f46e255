"""CUDA C++ to machine code by NVRTC, kept on disk; needs no card, no driver and no toolkit.

NVRTC comes with PyTorch's CUDA wheels (`nvidia-cuda-nvrtc`), and so do the headers
(`nvidia-cuda-runtime`); `cuda-core` calls it. The result is a CUBIN for one exact architecture,
never PTX: a driver refuses PTX of a newer compiler. `mma.h` needs `nvidia-cuda-crt` besides, which
PyTorch does not bring, so kernels that are shipped use `mma` in inline assembly.

An entry of the cache is one file: the SHA-256 of the rest in hexadecimal, a line of JSON facts, the
image. An entry that does not have its digest is compiled again. Its name is a SHA-256 over all that
the image depends on.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from kernels.errors import ConfigError
from kernels.registers import Resources, parse_log

SOURCES = Path(__file__).parent / "cuda"
"""Where the sources and the headers they share are."""

CACHE_VARIABLE = "QUANTBENCH_KERNEL_CACHE"
CACHE_VERSION = 1
"""Raise when an entry's format, or what a name is made of, changes."""

STANDARD = "c++17"
ASSEMBLER = ("-v",)
LOG_CHARACTERS = 3000
"""How much of a failed compilation's log is shown: its end."""

DIGEST_BYTES = 64
HEADER_WHEELS = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
COMPILER_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
TOOLKIT = Path("/usr/local/cuda")
NEEDED_HEADER = "cuda_fp16.h"
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """A kernel does not compile: kernel, architecture, compiler and the end of its log."""


@dataclass(frozen=True)
class Compiled:
    """A compiled source.

    Attributes:
        image: CUBIN.
        functions: kernel -> what it takes.
        log: of compiler and assembler.
        compiler: name and version.
    """

    image: bytes
    functions: dict[str, Resources]
    log: str
    compiler: str


@dataclass(frozen=True)
class Headers:
    """Where CUDA's headers are, and which they are."""

    folder: Path
    version: str


def compile_source(
    name: str,
    source: str,
    arch: str,
    defines: Mapping[str, int | str],
    folder: Path = SOURCES,
) -> Compiled:
    """Compile CUDA C++ for `arch` (`sm_90`), or read the same from the cache.

    `name` is a file name for messages; `#include "..."` finds headers of `folder`.

    Raises:
        BuildError: the source does not compile.
        ConfigError: compiler or headers are not installed, or the cache cannot be written.
    """
    compiler, headers = compiler_version(), find_headers()
    facts = {
        "cache": CACHE_VERSION,
        "name": name,
        "source": _sha256(source.encode()),
        "included": _included(source, folder),
        "defines": {key: str(value) for key, value in defines.items()},
        "options": [STANDARD, *ASSEMBLER],
        "arch": arch,
        "compiler": compiler,
        "headers": headers.version,
    }
    key = _sha256(json.dumps(facts, sort_keys=True).encode())
    entry = cache_folder() / f"{Path(name).stem}-{arch}-{key}.cubin"
    compiled = _read(entry)
    if compiled is None:
        compiled = _compile(name, source, arch, defines, [folder, headers.folder])
        _write(entry, compiled)
    return compiled


def compiler_version() -> str:
    """Return name and version of the compiler, as in `NVRTC 13.0 (nvidia-cuda-nvrtc 13.0.88)`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        _, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the library is not found
        raise ConfigError(
            "kernels for CUDA are compiled by NVRTC, which is not here: install a CUDA build of "
            f"torch and cuda-core ({str(error).splitlines()[0]})"
        ) from error
    wheel = _distribution(COMPILER_WHEELS)
    patch = f" ({wheel.metadata['Name']} {wheel.version})" if wheel else ""
    return f"NVRTC {major}.{minor}{patch}"


@cache
def unavailable() -> str | None:
    """Return why nothing can be compiled here, None where it can; touches no card."""
    try:
        importlib.import_module("cuda.core")
        compiler_version()
        find_headers()
    except ImportError as error:
        return f"kernels for CUDA are compiled through cuda-core: install it ({error})"
    except ConfigError as error:
        return str(error)
    return None


def find_headers() -> Headers:
    """Return the folder of CUDA's headers: PyTorch's wheel, or else an installed toolkit.

    Raises:
        ConfigError: there is neither.
    """
    wheel = _distribution(HEADER_WHEELS)
    for file in (wheel.files or []) if wheel else []:
        if wheel is not None and file.name == NEEDED_HEADER:
            found = Path(str(wheel.locate_file(file))).parent
            return Headers(found, f"{wheel.metadata['Name']} {wheel.version}")
    roots = [Path(os.environ[name]) for name in TOOLKIT_VARIABLES if os.environ.get(name)]
    for root in [*roots, TOOLKIT]:
        header = root / "include" / NEEDED_HEADER
        if header.is_file():
            return Headers(header.parent, f"{root} {_sha256(header.read_bytes())}")
    raise ConfigError(
        f"CUDA's headers are not here: install {HEADER_WHEELS[0]}, or set {TOOLKIT_VARIABLES[0]} "
        "to a toolkit"
    )


def cache_folder() -> Path:
    """Return where compiled kernels are kept."""
    asked = os.environ.get(CACHE_VARIABLE)
    if asked:
        return Path(asked)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "quantbench" / "kernels"


def _compile(
    name: str, source: str, arch: str, defines: Mapping[str, int | str], folders: list[Path]
) -> Compiled:
    try:
        core = importlib.import_module("cuda.core")
    except ImportError as error:
        raise ConfigError("kernels for CUDA are compiled through cuda-core: install it") from error
    compiler, log = compiler_version(), io.StringIO()
    options = core.ProgramOptions(
        name=name,
        arch=arch,
        std=STANDARD,
        ptxas_options=list(ASSEMBLER),
        # cuda-core refuses an empty list.
        define_macro=[(key, str(value)) for key, value in defines.items()] or None,
        include_path=[str(folder) for folder in folders],
        # Or headers of the folder the user happens to be in would be found first.
        no_source_include=True,
    )
    try:
        image = core.Program(source, "c++", options).compile("cubin", logs=log).code
    except Exception as error:
        # cuda-core's own errors have no public name; whatever it was, the log says it.
        end = f"{log.getvalue()}\n{error}".strip()[-LOG_CHARACTERS:]
        raise BuildError(f"{name} does not compile for {arch} with {compiler}: {end}") from error
    functions = parse_log(log.getvalue())
    if not isinstance(image, bytes) or not functions:
        end = log.getvalue()[-LOG_CHARACTERS:]
        raise BuildError(f"{name} gives no kernel for {arch} with {compiler}: {end}")
    return Compiled(image, functions, log.getvalue(), compiler)


def _included(source: str, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each project header that `source` reaches, by name."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        for name in INCLUDE.findall(waiting.pop()):
            header = folder / name
            if name not in found and header.is_file():
                text = header.read_text(encoding="utf-8")
                found[name] = _sha256(text.encode())
                waiting.append(text)
    return found


def _read(entry: Path) -> Compiled | None:
    """Return what the cache holds, None where it holds nothing or something damaged."""
    try:
        stored = entry.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(error) from error
    digest, payload = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    if digest != _sha256(payload).encode():
        return None
    line, _, image = payload.partition(b"\n")
    facts = json.loads(line)
    functions = {key: Resources(**value) for key, value in facts["functions"].items()}
    return Compiled(image, functions, facts["log"], facts["compiler"])


def _write(entry: Path, compiled: Compiled) -> None:
    """Put a result into the cache whole: another process reads all of it or nothing."""
    facts = {
        "functions": {key: asdict(value) for key, value in compiled.functions.items()},
        "log": compiled.log,
        "compiler": compiled.compiler,
    }
    payload = json.dumps(facts).encode() + b"\n" + compiled.image
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
            file.write(_sha256(payload).encode() + payload)
        Path(file.name).replace(entry)
    except OSError as error:
        raise _unusable(error) from error


def _unusable(error: OSError) -> ConfigError:
    return ConfigError(
        f"the cache of compiled kernels cannot be used ({error}); set {CACHE_VARIABLE} to a folder "
        "that can"
    )


def _distribution(names: tuple[str, ...]) -> importlib.metadata.Distribution | None:
    for name in names:
        try:
            return importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
