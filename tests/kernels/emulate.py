"""Builds a CUDA kernel with the host's C++ compiler and runs it on torch tensors of the CPU."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kernels.compiler import SOURCES

HEADER = Path(__file__).with_name("host_device.h")
Argument = Tensor | int | float | None


class Emulated:
    """One kernel of one file with one set of defines, built into `folder`."""

    def __init__(
        self, folder: Path, file: str, function: str, defines: Mapping[str, int | str]
    ) -> None:
        name = "-".join([function, *(f"{key}{value}" for key, value in defines.items())])
        main, library = folder / f"{name}.cpp", folder / f"{name}.so"
        if not library.exists():
            main.write_text(f'#include "{SOURCES / file}"\nQB_HOST_ENTRY({function})\n')
            macros = [f"-D{key}={value}" for key, value in defines.items()]
            command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
            command += [
                "-DQB_HOST",
                "-include",
                str(HEADER),
                *macros,
                str(main),
                "-o",
                str(library),
            ]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            assert built.returncode == 0, built.stderr
        self.library = ctypes.CDLL(str(library))
        self.library.launch.restype = ctypes.c_char_p
        self.library.register_range.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        *arguments: Argument,
        backwards: bool = False,
    ) -> None:
        """Run all blocks, one after another; fail on an access that a card may not forgive.

        `backwards` runs the last thread of a block first.
        """
        self.library.forget_ranges()
        slots = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                assert argument.is_contiguous()
                size = argument.numel() * argument.element_size()
                self.library.register_range(argument.data_ptr(), size)
                slots.append(argument.data_ptr())
            elif isinstance(argument, float):
                slots.append(struct.unpack("<i", struct.pack("<f", argument))[0])
            else:
                slots.append(argument or 0)
        three = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        packed = (ctypes.c_longlong * len(slots))(*slots)
        message = self.library.launch(three, threads, shared_bytes, int(backwards), packed)
        assert not message, message.decode()
