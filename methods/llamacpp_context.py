"""A model that llama.cpp loaded, and its contexts: what `methods.llamacpp_engine` computes on.

One context holds the keys and values of the sequences of one cache and grows with them; the calls
are those of `llama.h`. Everything C owns is freed by `close` and `free`, contexts before the model.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.base import Hardware

F32 = 0
"""`GGML_TYPE_F32`."""

BATCH = 512
"""Tokens that one call reads at most, all sequences together: llama.cpp's own physical batch."""

ROOM = 64
"""Tokens a fresh cache has room for beyond those it was made for, so that decoding can begin."""

PADDING = 256
"""llama.cpp rounds the tokens that a sequence has room for up to a multiple of this."""


class Llama(Protocol):
    """llama_cpp's module as `api`, and the errors it said."""

    api: Any
    said: deque[str]

    def reason(self) -> str:
        """Return the first error since `said` was cleared, for the end of a sentence."""
        ...


class Model:
    """A loaded file, and the contexts that compute on it."""

    def __init__(
        self, llama: Llama, path: Path, hardware: Hardware, kv: tuple[int, int], use_mmap: bool
    ) -> None:
        self.llama = llama
        self.api = llama.api
        self.threads = hardware.usable_threads
        self.on_card = hardware.device == "cuda"
        self.kv_type, kv_bytes = kv
        self.contexts: set[Context] = set()
        self.waiting: Context | None = None
        self.llama.said.clear()
        self.pointer = self.api.llama_model_load_from_file(
            str(path).encode(), self._parameters(hardware, use_mmap)
        )
        if not self.pointer:
            raise ConfigError(f"llama.cpp cannot load {path.name}: {self.llama.reason()}")
        vocabulary = self.api.llama_model_get_vocab(self.pointer)
        self.vocab_size = int(self.api.llama_vocab_n_tokens(vocabulary))
        self.context_length = int(self.api.llama_model_n_ctx_train(self.pointer))
        self.token_bytes = self._values_per_token() * kv_bytes

    def _parameters(self, hardware: Hardware, use_mmap: bool) -> Any:
        parameters = self.api.llama_model_default_params()
        mode = "LLAMA_LOAD_MODE_MMAP" if use_mmap else "LLAMA_LOAD_MODE_NONE"
        parameters.load_mode = getattr(self.api, mode)
        if self.on_card:
            layers = hardware.gpu_layers
            parameters.n_gpu_layers = -1 if layers is None else layers
        else:
            parameters.n_gpu_layers = 0
            # A list without a device: a build for cards must not touch one.
            self.no_devices = (ctypes.c_void_p * 1)(None)
            parameters.devices = ctypes.cast(self.no_devices, ctypes.c_void_p)
        return parameters

    def _values_per_token(self) -> int:
        """Return the numbers kept of one token: a key and a value of each layer and head."""
        api, model = self.api, self.pointer
        heads = int(api.llama_model_n_head(model))
        default = int(api.llama_model_n_embd(model)) // heads
        arch = self._text("general.architecture")
        widths = sum(
            int(self._text(f"{arch}.attention.{which}_length") or default)
            for which in ("key", "value")
        )
        return int(api.llama_model_n_layer(model)) * int(api.llama_model_n_head_kv(model)) * widths

    def _text(self, key: str) -> str:
        """Return a value of the file's metadata as text, empty where there is none."""
        buffer = ctypes.create_string_buffer(256)
        length = self.api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, 256)
        return buffer.value.decode() if length >= 0 else ""

    def take(self, sequences: int, tokens: int, outputs: int) -> Context:
        """Return an empty context: the one that waits, if it is of this batch, or a new one."""
        if self.pointer is None:
            raise RuntimeError("the engine is closed")
        found, self.waiting = self.waiting, None
        if found is not None and found.sequences == sequences:
            self.api.llama_memory_clear(self.api.llama_get_memory(found.pointer), False)
            return found
        if found is not None:
            found.free()
        context = Context(self, sequences, tokens, outputs)
        self.contexts.add(context)
        return context

    def give_back(self, context: Context) -> None:
        """Keep a context that no cache uses any more for the next one; free the one before it."""
        if context.pointer is None:
            return
        if self.waiting is not None:
            self.waiting.free()
        self.waiting = context

    def close(self) -> None:
        """Free contexts and model; a second call does nothing."""
        for context in list(self.contexts):
            context.free()
        self.waiting = None
        if self.pointer is not None:
            self.api.llama_model_free(self.pointer)
            self.pointer = None


class Context:
    """A llama_context for `sequences` sequences, and the arrays that its batches are made of."""

    def __init__(self, model: Model, sequences: int, tokens: int, outputs: int) -> None:
        self.model = model
        self.api = model.api
        self.sequences = sequences
        self.outputs = outputs
        self.pointer = self._create(self._with_room(tokens))
        self.size = max(BATCH, sequences)
        self.tokens = np.zeros(self.size, np.int32)
        self.positions = np.zeros(self.size, np.int32)
        self.ids = np.zeros(self.size, np.int32)
        self.wanted = np.zeros(self.size, np.int8)
        self.ones = np.ones(self.size, np.int32)
        places = np.arange(self.size, dtype=np.uint64) * np.uint64(self.ids.itemsize)
        self.id_addresses = places + np.uint64(self.ids.ctypes.data)
        self.batch = self._batch()

    def _with_room(self, tokens: int) -> int:
        wanted = min(tokens + ROOM, self.model.context_length)
        return -(-wanted // PADDING) * PADDING

    def _create(self, tokens: int) -> Any:
        api, model = self.api, self.model
        parameters = api.llama_context_default_params()
        # Apart, not unified: sequences of a batch share nothing, and each has `tokens` cells.
        parameters.n_seq_max, parameters.kv_unified = self.sequences, False
        parameters.n_ctx = tokens * self.sequences
        parameters.n_batch = parameters.n_ubatch = max(BATCH, self.sequences)
        # Without it room for the logits of a whole batch is reserved where one row is asked for.
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = self.outputs
        parameters.n_threads = parameters.n_threads_batch = model.threads
        parameters.type_k = parameters.type_v = model.kv_type
        if model.kv_type == F32:
            parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.offload_kqv = parameters.op_offload = model.on_card
        parameters.no_perf = True
        model.llama.said.clear()
        pointer = api.llama_init_from_model(model.pointer, parameters)
        if not pointer:
            raise RuntimeError(f"llama.cpp made no context: {model.llama.reason()}")
        self.capacity = int(api.llama_n_ctx_seq(pointer))
        self.step = int(api.llama_n_batch(pointer)) // self.sequences
        return pointer

    def _batch(self) -> Any:
        def address(array: np.ndarray[Any, Any], kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        batch = self.api.llama_batch()
        batch.token = address(self.tokens, ctypes.c_int32)
        batch.pos = address(self.positions, ctypes.c_int32)
        batch.n_seq_id = address(self.ones, ctypes.c_int32)
        batch.seq_id = address(self.id_addresses, ctypes.POINTER(ctypes.c_int32))
        batch.logits = address(self.wanted, ctypes.c_int8)
        return batch

    def ensure(self, tokens: int, outputs: int) -> None:
        """Have room for `tokens` tokens a sequence and `outputs` rows of logits in one call."""
        if self.pointer is None:
            raise RuntimeError("the engine is closed")
        if tokens <= self.capacity and outputs <= self.outputs:
            return
        states = self.states()
        self.api.llama_free(self.pointer)
        self.pointer = None
        self.outputs = max(outputs, self.outputs)
        # Doubled, so that decoding token by token seldom comes here.
        wanted = tokens if tokens <= self.capacity else max(tokens, 2 * self.capacity)
        self.pointer = self._create(max(self._with_room(wanted), self.capacity))
        self.take_states(states)

    def states(self) -> list[Any]:
        """Return the keys and values of all sequences as llama.cpp's own bytes."""
        return [self._state(sequence) for sequence in range(self.sequences)]

    def take_states(self, states: Sequence[Any]) -> None:
        """Take what `states` of a context of as many sequences returned."""
        for sequence, state in enumerate(states):
            if self.api.llama_state_seq_set_data(self.pointer, state, len(state), sequence) == 0:
                raise RuntimeError("llama.cpp did not take the keys and values of another cache")

    def _state(self, sequence: int) -> Any:
        size = self.api.llama_state_seq_get_size(self.pointer, sequence)
        state = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.pointer, state, size, sequence)
        return state

    def read(self, ids: np.ndarray[Any, Any], known: int, last: int) -> Tensor:
        """Read int32 [B, T] behind `known` tokens; return float32 logits [B, last, V]."""
        rows, tokens = ids.shape
        first = tokens - last
        logits = torch.empty(rows, last, self.model.vocab_size)
        for begin in range(0, tokens, self.step):
            end = min(begin + self.step, tokens)
            self._decode(ids[:, begin:end], known + begin, known + first)
            start = max(begin, first)
            if start < end:
                shape = (rows, end - start, self.model.vocab_size)
                found = np.ctypeslib.as_array(self.api.llama_get_logits(self.pointer), shape)
                logits[:, start - first : end - first] = torch.from_numpy(found)
        return logits

    def _decode(self, ids: np.ndarray[Any, Any], position: int, first: int) -> None:
        """Read int32 [B, n], the first token at `position`; ask for logits from `first` on."""
        rows, tokens = ids.shape
        count = rows * tokens
        positions = np.arange(position, position + tokens, dtype=np.int32)
        self.tokens[:count] = ids.reshape(-1)
        self.positions[:count] = np.tile(positions, rows)
        self.ids[:count] = np.repeat(np.arange(rows, dtype=np.int32), tokens)
        self.wanted[:count] = np.tile(positions >= first, rows)
        self.batch.n_tokens = count
        self.model.llama.said.clear()
        code = self.api.llama_decode(self.pointer, self.batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}: {self.model.llama.reason()}")

    def free(self) -> None:
        """Free the llama_context; a second call does nothing."""
        self.model.contexts.discard(self)
        if self.pointer is not None:
            self.api.llama_free(self.pointer)
            self.pointer = None
