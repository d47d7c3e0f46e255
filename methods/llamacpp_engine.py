"""A GGUF file run by llama.cpp inside this process, behind the `Engine` protocol.

Through llama-cpp-python's low-level API (`llama.h`, one function each): a model is a file mapped or
read into memory, a context holds the keys and values of some sequences and computes on them.
Conventions:

- A cache is a context of its own, for as many sequences as the batch has, that grows with them up
  to the model's context length. When a cache is dropped its context waits for the next one of the
  same batch, as a llama.cpp server keeps its slots.
- Keys and values are stored in `hardware.compute_dtype`. Activations are float32 between the
  products; what each product rounds them to stands in `methods.llamacpp_kernels`.
- Flash attention is `auto`, llama.cpp's default (on a CPU: on), but off for float32 keys and
  values: llama.cpp rounds those to float16 on the way into it (mean KL 1e-7 instead of 1e-12).
- llama.cpp's threads are OpenMP's: they spin for some milliseconds after a call and then sleep, as
  PyTorch's do, so that engines timed in turns hardly disturb each other.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.base import Cache, Hardware, KernelUse
from methods.engine import CAPABILITIES
from methods.library import require
from methods.llamacpp_context import BATCH, F32, Model

KV_TYPES = {"float32": (F32, 4), "float16": (1, 2), "bfloat16": (30, 2)}
"""Number in `ggml_type`, and bytes, of one key or value."""

WARNING, ERROR, CONTINUED = 3, 4, 5
"""Levels of llama.cpp's log (`ggml_log_level`); 5 goes on in the level before it."""

EXPECTED = "possible training context overflow"
"""A cache is padded to 256 tokens even where a tiny model's context ends earlier; no token ever
stands there, since this engine counts them."""

OWNER = "the llama.cpp engine"


class Library:
    """llama_cpp with a log that says warnings and errors, and keeps the errors in `said`."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.said: deque[str] = deque(maxlen=20)
        self._least, self._level = WARNING, 0
        # Kept: ctypes does not hold what C calls back.
        self.callback = api.llama_log_callback(self._write)
        api.llama_log_set(self.callback, ctypes.c_void_p(0))
        api.llama_backend_init()

    def _write(self, level: int, text: bytes, _: Any) -> None:
        self._level = self._level if level == CONTINUED else level
        line = text.decode(errors="replace")
        if self._least <= self._level <= ERROR and EXPECTED not in line:
            sys.stderr.write(line)
            if self._level == ERROR:
                self.said.append(line)

    @contextmanager
    def errors_only(self) -> Iterator[None]:
        """Leave warnings unsaid: a line for each tensor, of what is known before."""
        self._least = ERROR
        try:
            yield
        finally:
            self._least = WARNING

    def reason(self) -> str:
        """Return the first error since `said` was cleared, for the end of a sentence."""
        # Those after it only say that something failed.
        return " ".join(self.said[0].split()) if self.said else "llama.cpp gives no reason"


@cache
def library() -> Library:
    """Load llama.cpp once; its warnings and errors go to standard error, nothing else does.

    Raises:
        ConfigError: llama-cpp-python is not installed.
    """
    require("llama_cpp", OWNER, "llama-cpp-python")
    import llama_cpp

    return Library(llama_cpp)


def is_installed() -> bool:
    """Whether llama-cpp-python can be imported; nothing is loaded to find out."""
    return find_spec("llama_cpp") is not None


def check_device(hardware: Hardware) -> None:
    """Raise ConfigError where llama.cpp was built without what `hardware` names."""
    if hardware.device == "cuda" and not library().api.llama_supports_gpu_offload():
        raise ConfigError(
            "llama-cpp-python is built for the CPU only; for hardware.device cuda build it again: "
            "CMAKE_ARGS=-DGGML_CUDA=on python -m pip install --no-binary llama-cpp-python "
            "--force-reinstall --no-deps llama-cpp-python"
        )


class LlamaCppCache:
    """Keys and values of `sequences` sequences of equal length, `length` tokens each."""

    def __init__(self, model: Model, sequences: int, tokens: int, outputs: int) -> None:
        self.sequences = sequences
        self.length = 0
        self.context = model.take(sequences, tokens, outputs)
        self._token_bytes = model.token_bytes
        weakref.finalize(self, model.give_back, self.context)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values read so far: layers x heads x width x type, by arithmetic."""
        return self.sequences * self.length * self._token_bytes


class LlamaCppEngine:
    """A model that llama.cpp loaded; see the module's text for its conventions."""

    most_forked: ClassVar[int] = 1

    def __init__(self, path: Path, model: Model, uses: list[KernelUse]) -> None:
        self._path = path
        self._model = model
        self._uses = uses
        # Contexts before the model, and both also where nobody closes.
        weakref.finalize(self, model.close)

    @property
    def capabilities(self) -> frozenset[str]:
        """Everything but serving: logits, caches that fork, generation, memory."""
        return CAPABILITIES

    @property
    def runtime(self) -> str:
        """llama.cpp."""
        return "llama.cpp"

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._model.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens the model takes at once."""
        return self._model.context_length

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, cache: Cache | None = None, last: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Read int64 [B, T]; return float32 logits [B, last or T, V] on the CPU, and the cache.

        Raises:
            ConfigError: more sequences or tokens than the model takes, or a token it has not.
        """
        ids = input_ids.to("cpu", torch.int32).numpy()
        sequences, tokens = ids.shape
        last = min(last or tokens, tokens)
        known = cache.length if cache is not None else 0
        self._check(ids, known, cache)
        # A call reads at most BATCH tokens, so it has no more logits than that.
        outputs = min(sequences * last, max(BATCH, sequences))
        if cache is None:
            cache = LlamaCppCache(self._model, sequences, tokens, outputs)
        cache.context.ensure(known + tokens, outputs)
        logits = cache.context.read(ids, known, last)
        cache.length = known + tokens
        return logits, cache

    @torch.no_grad()
    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read int64 [B, 1]; return float32 logits [B, 1, V] and the advanced cache."""
        return self.prefill(token, cache, last=1)

    def fork(self, cache: Cache, rows: Sequence[int]) -> Cache:
        """Return a copy of a cache of one sequence.

        llama.cpp's own form of a sequence's state names the number of sequences of its context, so
        that it is not taken by a context of another number.

        Raises:
            ValueError: there are several sequences.
        """
        if list(rows) != [0] or cache.sequences != 1:
            raise ValueError("llama.cpp copies caches of one sequence only")
        forked = LlamaCppCache(self._model, 1, cache.length, 1)
        forked.context.ensure(cache.length, 1)
        forked.context.take_states(cache.context.states())
        forked.length = cache.length
        return forked

    def _check(self, ids: np.ndarray[Any, Any], known: int, cache: LlamaCppCache | None) -> None:
        sequences, tokens = ids.shape
        most = int(library().api.llama_max_parallel_sequences())
        if sequences > most:
            raise ConfigError(f"llama.cpp reads at most {most} sequences at once, not {sequences}")
        if cache is not None and cache.sequences != sequences:
            raise ConfigError(
                f"the cache holds {cache.sequences} sequences, but {sequences} are to be read on"
            )
        if known + tokens > self.context_length:
            raise ConfigError(
                f"the model reads at most {self.context_length} tokens; {known + tokens} were given"
            )
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ConfigError(
                f"a token is outside the model's vocabulary of {self.vocab_size}: "
                f"{int(ids.min())} to {int(ids.max())} were given"
            )

    def stored_bytes(self) -> dict[str, int]:
        """Return the bytes of each tensor of the file, by Hugging Face parameter names."""
        from methods.gguf_read import stored_tensors

        return {name: tensor.bytes for name, tensor in stored_tensors(self._path).items()}

    def kernels(self) -> list[KernelUse]:
        """Return what runs each matrix."""
        return list(self._uses)

    def close(self) -> None:
        """Free the contexts of all caches, then the model; caches are of no use afterwards."""
        self._model.close()


def open_engine(
    path: Path, hardware: Hardware, uses: list[KernelUse], use_mmap: bool = True
) -> LlamaCppEngine:
    """Load the GGUF file `path`; `uses` says what runs each matrix.

    `use_mmap` maps the file instead of reading it; weights that llama.cpp stores in another order
    for this processor, or on a card, are copied in either case.

    Raises:
        ConfigError: llama.cpp is missing, was built without the device, or refuses the file.
    """
    check_device(hardware)
    return LlamaCppEngine(
        path, Model(library(), path, hardware, KV_TYPES[hardware.compute_dtype], use_mmap), uses
    )
