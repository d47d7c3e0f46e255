"""The types of GGUF: what a block of weights takes, and which type llama.cpp gives which tensor.

A file type (`Q4_K_M`) is a mixture: a main tensor type (`Q4_K`) and rules that give some tensors of
some layers more bits. Both are llama.cpp's own (`ggml-common.h`, `src/llama-quant.cpp`); the rules
stand here once more as a table, so that sizes are known without llama.cpp and without weights, and
so that what a row's width cannot take is said before anything is quantized. `methods.gguf` holds
each file it made against this table. Only what dense models of the families of
`methods.gguf_names` meet is here: no experts, no Falcon.

Free of torch, gguf and llama_cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kernels.errors import ConfigError


@dataclass(frozen=True)
class TensorType:
    """How the weights of one tensor are stored.

    Attributes:
        number: ggml's own (`enum ggml_type`).
        block: consecutive weights of a row that are stored together.
        bytes: bytes of a block, scales included.
        bits: bits of a weight without scales (an index into a table of patterns counts).
        group: consecutive weights that share a scale; None: no scales.
        activations: type that a CPU kernel rounds the other factor of a product to.
    """

    number: int
    block: int
    bytes: int
    bits: float
    group: int | None
    activations: str


TENSOR_TYPES: dict[str, TensorType] = {
    "F32": TensorType(0, 1, 4, 32, None, "F32"),
    "F16": TensorType(1, 1, 2, 16, None, "F16"),
    "BF16": TensorType(30, 1, 2, 16, None, "BF16"),
    "Q8_0": TensorType(8, 32, 34, 8, 32, "Q8_0"),
    "Q6_K": TensorType(14, 256, 210, 6, 16, "Q8_K"),
    "Q5_K": TensorType(13, 256, 176, 5, 32, "Q8_K"),
    "Q5_1": TensorType(7, 32, 24, 5, 32, "Q8_1"),
    "Q5_0": TensorType(6, 32, 22, 5, 32, "Q8_0"),
    "Q4_K": TensorType(12, 256, 144, 4, 32, "Q8_K"),
    "Q4_1": TensorType(3, 32, 20, 4, 32, "Q8_1"),
    "Q4_0": TensorType(2, 32, 18, 4, 32, "Q8_0"),
    "IQ4_NL": TensorType(20, 32, 18, 4, 32, "Q8_0"),
    "IQ4_XS": TensorType(23, 256, 136, 4, 32, "Q8_K"),
    "Q3_K": TensorType(11, 256, 110, 3, 16, "Q8_K"),
    "IQ3_S": TensorType(21, 256, 110, 3.25, 32, "Q8_K"),
    "IQ3_XXS": TensorType(18, 256, 98, 2.875, 32, "Q8_K"),
    "Q2_K": TensorType(10, 256, 84, 2, 16, "Q8_K"),
    "IQ2_S": TensorType(22, 256, 82, 2.25, 16, "Q8_K"),
    "IQ2_XS": TensorType(17, 256, 74, 2, 16, "Q8_K"),
    "IQ2_XXS": TensorType(16, 256, 66, 1.875, 32, "Q8_K"),
    "TQ2_0": TensorType(35, 256, 66, 2, 256, "Q8_K"),
    "TQ1_0": TensorType(34, 256, 54, 1.625, 256, "Q8_K"),
    "IQ1_M": TensorType(29, 256, 56, 1.375, 16, "Q8_K"),
    "IQ1_S": TensorType(19, 256, 50, 1.375, 32, "Q8_K"),
}

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that are no quantization, by torch's names."""

NEED_IMPORTANCE = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
"""Tensor types that are garbage without an importance matrix; llama.cpp refuses or aborts."""

IGNORE_IMPORTANCE = frozenset({*FLOATS, "Q8_0", "TQ1_0", "TQ2_0"})
"""Tensor types whose rounding does not look at an importance matrix."""


@dataclass(frozen=True)
class FileType:
    """A mixture that llama.cpp makes: its number (`enum llama_ftype`) and main tensor type."""

    number: int
    main: str
    needs_importance: bool = False


FILE_TYPES: dict[str, FileType] = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "BF16": FileType(32, "BF16"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q6_K": FileType(18, "Q6_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q4_0": FileType(2, "Q4_0"),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "IQ3_M": FileType(27, "IQ3_S"),
    "IQ3_S": FileType(26, "IQ3_S"),
    "IQ3_XS": FileType(22, "IQ3_S", needs_importance=True),
    "IQ3_XXS": FileType(23, "IQ3_XXS", needs_importance=True),
    "Q2_K": FileType(10, "Q2_K"),
    "Q2_K_S": FileType(21, "Q2_K", needs_importance=True),
    "IQ2_M": FileType(29, "IQ2_S", needs_importance=True),
    "IQ2_S": FileType(28, "IQ2_XS", needs_importance=True),
    "IQ2_XS": FileType(20, "IQ2_XS", needs_importance=True),
    "IQ2_XXS": FileType(19, "IQ2_XXS", needs_importance=True),
    "TQ2_0": FileType(37, "TQ2_0"),
    "TQ1_0": FileType(36, "TQ1_0"),
    "IQ1_M": FileType(31, "IQ1_M", needs_importance=True),
    "IQ1_S": FileType(24, "IQ1_S", needs_importance=True),
}


@dataclass(frozen=True)
class Choice:
    """What the user chose: names of FILE_TYPES and TENSOR_TYPES, and whether there is a matrix."""

    file_type: str
    pure: bool = False
    output: str | None = None
    embedding: str | None = None
    importance: bool = False


@dataclass(frozen=True)
class Shape:
    """What llama.cpp looks at beside a tensor's own name and width.

    Attributes:
        layers: number of decoder blocks.
        sharing: query heads that share one key and value head.
        tied: whether the embedding is the head, so that there is no `output.weight`.
        size_70b: whether llama.cpp takes the model for a 70B one (Llama or Qwen2, 80 layers).
    """

    layers: int
    sharing: int
    tied: bool
    size_70b: bool = False


@dataclass(frozen=True)
class Planned:
    """The type a tensor is stored in, and the one it would have if its rows were as wide."""

    type: str
    wanted: str


# When a rule holds, of the number of a layer and the shape of the model.
_Condition = Callable[[int, Shape, bool], bool]


def _always(layer: int, shape: Shape, importance: bool) -> bool:
    return True


def _shared(layer: int, shape: Shape, importance: bool) -> bool:
    return shape.sharing >= 4


def _first_eighth(layer: int, shape: Shape, importance: bool) -> bool:
    return layer < shape.layers // 8


def _first_sixteenth(layer: int, shape: Shape, importance: bool) -> bool:
    return layer < shape.layers // 16


def _first_eighth_with(layer: int, shape: Shape, importance: bool) -> bool:
    return importance and _first_eighth(layer, shape, importance)


def _first_eighth_without(layer: int, shape: Shape, importance: bool) -> bool:
    return not importance and _first_eighth(layer, shape, importance)


def _first_two(layer: int, shape: Shape, importance: bool) -> bool:
    return layer < 2


def _first_four(layer: int, shape: Shape, importance: bool) -> bool:
    return layer < 4


def _middle(layer: int, shape: Shape, importance: bool) -> bool:
    return shape.layers // 8 <= layer < 7 * shape.layers // 8


def _ends_and_thirds(layer: int, shape: Shape, importance: bool) -> bool:
    """Whether it is in the first or the last eighth of the layers, or each third between."""
    eighth = shape.layers // 8
    # Every layer before `eighth` is taken already, so the remainder is never of a negative number.
    return layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2


_Rules = dict[str, tuple[tuple[_Condition, str], ...]]

_VALUES: _Rules = {
    "Q5_K_M": ((_ends_and_thirds, "Q6_K"),),
    "Q4_K_M": ((_ends_and_thirds, "Q6_K"),),
    "Q4_K_S": ((_first_four, "Q5_K"),),
    "IQ4_NL": ((_shared, "Q5_K"),),
    "IQ4_XS": ((_shared, "Q5_K"),),
    "Q3_K_L": ((_always, "Q5_K"),),
    "Q3_K_M": ((_first_two, "Q5_K"), (_always, "Q4_K")),
    "IQ3_M": ((_always, "Q4_K"),),
    "IQ3_S": ((_shared, "Q4_K"),),
    "IQ3_XS": ((_shared, "Q4_K"),),
    "IQ3_XXS": ((_shared, "Q4_K"),),
    "Q2_K": ((_shared, "Q4_K"), (_always, "Q3_K")),
    "Q2_K_S": ((_shared, "Q4_K"),),
    "IQ2_M": ((_shared, "Q4_K"), (_always, "IQ3_S")),
    "IQ2_S": ((_shared, "Q4_K"), (_always, "IQ3_S")),
    "IQ2_XS": ((_shared, "Q4_K"), (_always, "Q2_K")),
    "IQ2_XXS": ((_shared, "Q4_K"), (_always, "Q2_K")),
    "IQ1_M": ((_shared, "Q4_K"), (_always, "Q2_K")),
    "IQ1_S": ((_shared, "Q4_K"), (_always, "Q2_K")),
}
_QUERIES_AND_KEYS: _Rules = {
    "IQ3_XS": ((_always, "IQ3_XXS"),),
    "IQ3_XXS": ((_always, "IQ2_S"),),
}
_OUTPUTS: _Rules = {
    "Q3_K_L": ((_always, "Q5_K"),),
    "Q3_K_M": ((_always, "Q4_K"),),
    "IQ3_M": ((_always, "Q4_K"),),
    "IQ3_XXS": ((_always, "IQ3_S"),),
    "Q2_K": ((_always, "Q3_K"),),
    "IQ2_M": ((_always, "IQ3_S"),),
    "IQ2_S": ((_always, "IQ3_S"),),
    "IQ1_M": ((_always, "IQ2_XXS"),),
    "IQ1_S": ((_always, "IQ2_XXS"),),
}
_DOWN: _Rules = {
    "Q5_K_M": ((_ends_and_thirds, "Q6_K"),),
    "Q5_0": ((_first_eighth_with, "Q5_1"),),
    "Q4_K_M": ((_ends_and_thirds, "Q6_K"),),
    "Q4_K_S": ((_first_eighth, "Q5_K"),),
    "Q4_0": ((_first_eighth_with, "Q4_1"),),
    "IQ4_NL": ((_first_eighth_without, "Q5_K"),),
    "IQ4_XS": ((_first_eighth_without, "Q5_K"),),
    "Q3_K_L": ((_always, "Q5_K"),),
    "Q3_K_M": ((_first_sixteenth, "Q5_K"), (_always, "Q4_K")),
    "IQ3_M": ((_first_eighth, "Q4_K"),),
    "Q2_K": ((_always, "Q3_K"),),
    "Q2_K_S": ((_first_eighth, "Q4_K"),),
    "IQ2_M": ((_first_eighth, "IQ3_S"),),
    "IQ2_S": ((_first_eighth, "IQ3_S"),),
    "IQ2_XS": ((_first_eighth, "Q2_K"),),
    "IQ2_XXS": ((_first_eighth, "Q2_K"),),
    "IQ1_M": ((_first_eighth, "Q2_K"),),
    "IQ1_S": ((_first_eighth, "Q2_K"),),
}
_GATE_AND_UP: _Rules = {"IQ3_XS": ((_middle, "IQ3_XXS"),)}

_RULES: dict[str, _Rules] = {
    "attn_v": _VALUES,
    "attn_qkv": _VALUES,
    "attn_q": _QUERIES_AND_KEYS,
    "attn_k": _QUERIES_AND_KEYS,
    "attn_output": _OUTPUTS,
    "ffn_down": _DOWN,
    "ffn_gate": _GATE_AND_UP,
    "ffn_up": _GATE_AND_UP,
}
"""Stem of a tensor's name -> file type -> rules, of which the first that holds gives the type."""

_HEAD_LOW = frozenset({"IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
"""File types whose head has Q5_K; the others have Q6_K, and Q8_0 keeps its own."""

_EMBEDDING: dict[str, str] = {
    **dict.fromkeys(("IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "Q2_K"),
    **dict.fromkeys(("IQ3_XXS", "IQ2_M", "IQ2_S"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "Q4_K"),
}
"""File type -> type of an embedding that is not the head too; the others have the main type."""

_INSTEAD: dict[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What llama.cpp stores where blocks of 256 do not divide a row; where 32 do not either: F16."""


def bits_of(tensor_type: str, rows: int, width: int) -> int:
    """Return the stored bits of [rows, width] weights; the block divides `width`."""
    kind = TENSOR_TYPES[tensor_type]
    return 8 * rows * (width // kind.block) * kind.bytes


def fits(tensor_type: str, width: int) -> bool:
    """Whether rows of `width` weights are whole blocks of the type."""
    return width % TENSOR_TYPES[tensor_type].block == 0


def plan(choice: Choice, shape: Shape, tensor: str, width: int) -> Planned:
    """Return the type that llama.cpp gives the matrix `tensor` (GGUF name) with rows of `width`.

    Source: `llama_tensor_get_type` and `tensor_type_fallback` in llama.cpp's `llama-quant.cpp`.

    Raises:
        ConfigError: a type the user chose for head or embedding does not divide the row.
    """
    forced = {
        "token_embd.weight": ("token_embedding_type", choice.embedding),
        "output.weight": ("output_tensor_type", choice.output),
    }
    option, own = forced.get(tensor, ("", None))
    if own is not None:
        if not fits(own, width):
            raise ConfigError(
                f"method.{option} is {own}, whose blocks of {TENSOR_TYPES[own].block} weights do "
                f"not divide this model's rows of {width}; Q8_0 takes multiples of 32, F16 any row"
            )
        return Planned(own, own)
    main = FILE_TYPES[choice.file_type].main
    if main in FLOATS:
        return Planned(main, main)
    if choice.pure:
        return Planned(fitting(main, width), main)
    if tensor == "output.weight" or (tensor == "token_embd.weight" and shape.tied):
        wanted = choice.output or _head(choice.file_type, main)
        # Where the main type's blocks do not fit, the head is Q8_0 whatever it was to be.
        at_once = "Q8_0" if choice.output is None and not fits(main, width) else wanted
        return Planned(fitting(at_once, width), wanted)
    wanted = _mixed(choice, shape, tensor)
    return Planned(fitting(wanted, width), wanted)


def _mixed(choice: Choice, shape: Shape, tensor: str) -> str:
    """Return the type of an embedding of its own, or of a matrix of the blocks."""
    main = FILE_TYPES[choice.file_type].main
    if tensor == "token_embd.weight":
        return _EMBEDDING.get(choice.file_type, main)
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
    if match is None:
        raise ValueError(f"{tensor} is no matrix of a GGUF file's blocks")
    layer, stem = int(match[1]), match[2]
    found = main
    for condition, better in _RULES[stem].get(choice.file_type, ()):
        if condition(layer, shape, choice.importance):
            found = better
            break
    values = stem in ("attn_v", "attn_qkv")
    # So few values where eight query heads share them that a bit more of each costs nothing.
    low = values and shape.size_70b and found in ("Q3_K", "Q4_K")
    return "Q5_K" if low and not choice.file_type.startswith(("IQ2", "IQ1")) else found


def _head(file_type: str, main: str) -> str:
    if main == "Q8_0":
        return main
    return "Q5_K" if file_type in _HEAD_LOW else "Q6_K"


def fitting(wanted: str, width: int) -> str:
    """Return what llama.cpp stores rows of `width` in where they are to be `wanted`."""
    if fits(wanted, width):
        return wanted
    instead = _INSTEAD.get(wanted, wanted)
    return instead if fits(instead, width) else "F16"
