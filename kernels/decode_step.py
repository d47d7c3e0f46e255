"""The decode step of `kernels/c/decode.c`: its structures, built of tensors, and the call.

`DecodeStep` is a decoder whose weights the C code reads where they lie. Tensors are contiguous and
on the CPU; whoever holds a pointer keeps its tensor alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.host_build import library
from kernels.host_linear import INT8, Matrix, activation_of

ALIGNMENT = 64
KINDS = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}
"""Type -> QB_BF16, QB_F16, QB_F32."""

LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")


class _Block(ctypes.Structure):
    """`qb_block`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, Matrix) for name in LINEARS),
    )


class _Model(ctypes.Structure):
    """`qb_model`."""

    _fields_ = (
        ("blocks", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("inner", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("cache_kind", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        ("norm", ctypes.c_void_p),
        ("block", ctypes.POINTER(_Block)),
        ("head", Matrix),
    )


class _Kept(ctypes.Structure):
    """`qb_kept`."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Weights:
    """A matrix as the C code reads it, and what keeps its memory alive."""

    matrix: Matrix
    keeps: tuple[object, ...]


@dataclass(frozen=True)
class Block:
    """A decoder block: norms float32 [hidden] ([head_size] of queries and keys, or None)."""

    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: Weights
    key: Weights
    value: Weights
    output: Weights
    gate: Weights
    up: Weights
    down: Weights


@dataclass(frozen=True)
class Shape:
    """What the blocks have in common.

    Attributes:
        cache: type of keys and values, bfloat16 or float32.
        epsilon: of every norm.
        scaling: factor of the scores.
    """

    heads: int
    kv_heads: int
    head_size: int
    cache: torch.dtype
    epsilon: float
    scaling: float


def dense(weight: Tensor, bias: Tensor | None) -> Weights:
    """Return an unquantized matrix [out, in]; a bias is kept as float32 [out].

    Raises:
        ValueError: it is not contiguous, or of a type that the C code does not read.
    """
    if not weight.is_contiguous() or weight.dtype not in KINDS or weight.device.type != "cpu":
        raise ValueError(f"a {weight.dtype} matrix with strides {weight.stride()}")
    rows, columns = weight.shape
    held = None if bias is None else bias.float().contiguous()
    matrix = Matrix(
        kind=KINDS[weight.dtype],
        activation=activation_of(weight.dtype),
        rows=rows,
        columns=columns,
        width=columns,
        group=columns,
        weight=weight.data_ptr(),
        bias=_pointer(held),
    )
    return Weights(matrix, (weight, held))


class DecodeStep:
    """A decoder in C: one call reads one token of each sequence of a batch.

    Attributes:
        rounds_activations: whether a matrix of its blocks reads them as int8.

    Raises:
        HostBuildError: the C kernels cannot be built on this machine.
    """

    def __init__(self, blocks: Sequence[Block], norm: Tensor, head: Weights, shape: Shape) -> None:
        functions = library()
        self._scratch_bytes = functions.qb_decode_scratch
        self._scratch_bytes.restype = ctypes.c_int64
        self._scratch_bytes.argtypes = [ctypes.POINTER(_Model), *[ctypes.c_int32] * 3]
        self._decode = functions.qb_decode
        self._decode.restype = ctypes.c_int32
        self._decode.argtypes = [
            ctypes.POINTER(_Model),
            ctypes.POINTER(_Kept),
            *[ctypes.c_void_p] * 3,
            *[ctypes.c_int32] * 2,
            *[ctypes.c_void_p] * 2,
            ctypes.c_int32,
        ]
        self.shape = shape
        self.hidden = norm.shape[0]
        self.vocabulary = head.matrix.rows
        self._keeps = (blocks, norm, head)
        self.rounds_activations = any(
            getattr(block, name).matrix.activation == INT8 for block in blocks for name in LINEARS
        )
        self._blocks = (_Block * len(blocks))(*(_c_block(block) for block in blocks))
        self._model = _Model(
            blocks=len(blocks),
            hidden=self.hidden,
            inner=blocks[0].gate.matrix.rows,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            cache_kind=KINDS[shape.cache],
            epsilon=shape.epsilon,
            scaling=shape.scaling,
            norm=norm.data_ptr(),
            block=self._blocks,
            head=head.matrix,
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        kept: Sequence[tuple[Tensor, Tensor]],
        length: int,
    ) -> Tensor:
        """Return float32 logits [B, V] of embedded tokens x, float32 [B, hidden].

        `rotation` is cos and sin of the position, float32 [head_size]; `kept` the keys and values
        of each block, [B, kv_heads, capacity, head_size] in the cache's type, of which `length`
        tokens are there: those of the token are written behind them.

        Raises:
            ValueError: a capacity is not above `length`.
        """
        batch, threads = x.shape[0], torch.get_num_threads()
        needed = self._scratch_bytes(self._model, batch, length, threads) + ALIGNMENT
        if self._scratch.numel() < needed:
            # Twice, so that a growing context does not ask again at every token.
            self._scratch = torch.empty(2 * needed, dtype=torch.uint8)
        scratch = -(-self._scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
        places = (_Kept * len(kept))(
            *(_Kept(keys.data_ptr(), values.data_ptr(), keys.shape[2]) for keys, values in kept)
        )
        logits = torch.empty(batch, self.vocabulary)
        cos, sin = (part.data_ptr() for part in rotation)
        wrong = self._decode(
            self._model,
            places,
            x.data_ptr(),
            cos,
            sin,
            batch,
            length,
            logits.data_ptr(),
            scratch,
            threads,
        )
        if wrong:
            raise ValueError(f"the cache has no room behind its {length} tokens")
        return logits


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _c_block(block: Block) -> _Block:
    norms = (_pointer(getattr(block, name)) for name in NORMS)
    return _Block(*norms, *(getattr(block, name).matrix for name in LINEARS))
