"""The C sources of `kernels/c` as one library for this processor, compiled once and kept on disk.

The host's own compiler (`CC`, or `cc`) builds for the machine it runs on. OpenMP's functions are
not linked: they resolve to the libgomp that torch has loaded, so that both share one pool of
threads. An entry of the cache is a library and a file with its SHA-256; one that does not have it
is built again. The name is a SHA-256 over sources, flags, compiler and the processor's features.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from kernels.compiler import CACHE_VARIABLE, cache_folder

SOURCES = Path(__file__).parent / "c"

CACHE_VERSION = 1
"""Raise when an entry's format, or what a name is made of, changes."""

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-fopenmp", "-ffp-contract=off")
"""Products and sums are joined only where a source asks for it: the same rounding in every loop."""

LINK = ("-shared", "-lm")
PORTABLE = "-DQB_PORTABLE"
LOG_CHARACTERS = 1500
COMPILE_SECONDS = 300


class HostBuildError(RuntimeError):
    """The C kernels cannot be built here: why, with the compiler and the end of its log."""


def library(portable: bool = False) -> ctypes.CDLL:
    """Return the library, compiled on the first call on this machine.

    `portable` leaves out what only some processors have: for tests, and slower.

    Raises:
        HostBuildError: there is no compiler, or it fails, or the cache cannot be written.
    """
    found = _library(os.environ.get("CC", "cc"), str(cache_folder()), portable)
    if isinstance(found, HostBuildError):
        raise found
    return found


def unavailable() -> str | None:
    """Return why the C kernels cannot run on this machine, None where they can."""
    try:
        library()
    except HostBuildError as error:
        return str(error)
    return None


def compiler_version(compiler: str) -> str:
    """Return the first line of what the compiler says of itself.

    Raises:
        HostBuildError: there is none of this name.
    """
    path = shutil.which(compiler)
    if path is None:
        raise HostBuildError(
            f"the C kernels need a C compiler, and there is no `{compiler}`: install gcc or clang, "
            "or set CC to one"
        )
    return _run([path, "--version"], compiler).splitlines()[0]


def cpu_features() -> str:
    """Return the features of this processor as the system names them, or its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def sources_digest() -> str:
    """Return what tells these sources from others."""
    texts = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


@cache
def _library(compiler: str, folder: str, portable: bool) -> ctypes.CDLL | HostBuildError:
    """Return the library, or why there is none: what failed once is not tried for every matrix."""
    try:
        return _loaded(compiler, folder, portable)
    except HostBuildError as error:
        return error


def _loaded(compiler: str, folder: str, portable: bool) -> ctypes.CDLL:
    flags = (*FLAGS, PORTABLE) if portable else FLAGS
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.[ch]"))}
    facts = {
        "cache": CACHE_VERSION,
        "sources": texts,
        "flags": [*flags, *LINK],
        "compiler": compiler_version(compiler),
        "cpu": cpu_features(),
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    entry = Path(folder) / f"host-{key}.so"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        if not _sound(entry):
            _build(compiler, flags, entry)
        return ctypes.CDLL(str(entry))
    except OSError as error:
        raise HostBuildError(
            f"the compiled C kernels cannot be kept or loaded ({error}); set {CACHE_VARIABLE} to a "
            "folder that can be written"
        ) from error


def _sound(entry: Path) -> bool:
    """Return whether the cache holds this library whole."""
    digest = entry.with_suffix(".sha256")
    if not entry.is_file() or not digest.is_file():
        return False
    return digest.read_text(encoding="utf-8") == _sha256(entry)


def _build(compiler: str, flags: tuple[str, ...], entry: Path) -> None:
    """Compile into a folder of its own and put the result in place whole, its digest last."""
    with tempfile.TemporaryDirectory(dir=entry.parent) as folder:
        built, digest = Path(folder) / entry.name, Path(folder) / "sha256"
        sources = sorted(SOURCES.glob("*.c"))
        _run([compiler, *flags, "-c", *map(str, sources)], compiler, folder)
        objects = [f"{source.stem}.o" for source in sources]
        _run([compiler, *objects, "-o", str(built), *LINK], compiler, folder)
        digest.write_text(_sha256(built), encoding="utf-8")
        # Two builds need not be equal byte by byte: without the old digest nobody reads a mixture.
        entry.with_suffix(".sha256").unlink(missing_ok=True)
        built.replace(entry)
        digest.replace(entry.with_suffix(".sha256"))


def _run(command: list[str], compiler: str, folder: str | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostBuildError(f"the C compiler `{compiler}` does not run: {error}") from error
    if done.returncode != 0:
        end = (done.stderr or done.stdout).strip()[-LOG_CHARACTERS:]
        raise HostBuildError(f"the C kernels do not compile with `{compiler}`: {end}")
    return done.stdout


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> int:
    """Build the library ahead of its first use, and say in one line what came of it."""
    reason = unavailable()
    print(f"C kernels: not built, {reason}" if reason else "C kernels: built for this processor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
