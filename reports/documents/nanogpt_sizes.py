"""What the documents' nanoGPT figures would have to be: sizes by arithmetic.

The documents load `out/ckpt.pt` of the character model of nanoGPT's README (6 layers, 6 heads,
384 wide, 256 characters of context, 65 characters, no biases), quantize it with `quantize_dynamic`,
save it, and print "39.47 MB -> 11.23 MB, 3.52x". Both sizes are of files on disk.

Torch's `quantize_dynamic(..., {Linear, Embedding}, qint8)` rounds linear maps to INT8 with one
float32 scale and one zero point a matrix, and refuses embeddings with that configuration: they stay
float32. The head is a linear map that shares its weights with the embedding; it is quantized on its
own, so its weights are stored twice, as INT8 and as the embedding's float32.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32, INT8 = 4, 1
MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """A nanoGPT: layers, width, context and vocabulary; `bias` counts in maps and norms."""

    layers: int
    width: int
    context: int
    vocabulary: int
    bias: bool = False


SHAKESPEARE_CHAR = Shape(layers=6, width=384, context=256, vocabulary=65)
"""The model of `config/train_shakespeare_char.py`, which the documents quantize."""


@dataclass(frozen=True)
class Sizes:
    """Counts of parameters and bytes of tensors, without what a file adds around them.

    Attributes:
        parameters: all of them, the tied head once, position embeddings included.
        linear: those of linear maps in the blocks.
        head: those of the head, which are the token embedding's.
        float32_bytes: the weights as float32.
        checkpoint_bytes: the weights and AdamW's two moments of each: nanoGPT's `ckpt.pt`.
        dynamic_bytes: blocks and head as INT8, all else as float32, the embedding included.
        tied_dynamic_bytes: the same with the head left to share the float32 embedding.
    """

    parameters: int
    linear: int
    head: int
    float32_bytes: int
    checkpoint_bytes: int
    dynamic_bytes: int
    tied_dynamic_bytes: int

    @property
    def dynamic_ratio(self) -> float:
        """How many times smaller than the float32 weights `quantize_dynamic` makes them."""
        return self.float32_bytes / self.dynamic_bytes

    @property
    def checkpoint_ratio(self) -> float:
        """The same against the checkpoint: what comparing the two files gives."""
        return self.checkpoint_bytes / self.dynamic_bytes


def sizes(shape: Shape) -> Sizes:
    """Return the sizes of a nanoGPT; scales of matrices (a few bytes each) are not counted.

    A block has 12 * width ** 2 weights in four linear maps (3, 1, 4 and 4 times width ** 2) and two
    norms; with biases 9 * width more in the maps and two norms' worth.
    """
    width = shape.width
    linear = shape.layers * 12 * width**2
    embedding, positions = shape.vocabulary * width, shape.context * width
    norms = (2 * shape.layers + 1) * width * (2 if shape.bias else 1)
    biases = shape.layers * 9 * width if shape.bias else 0
    parameters = linear + embedding + positions + norms + biases
    rest = FLOAT32 * (parameters - linear)
    return Sizes(
        parameters=parameters,
        linear=linear,
        head=embedding,
        float32_bytes=FLOAT32 * parameters,
        checkpoint_bytes=3 * FLOAT32 * parameters,
        dynamic_bytes=INT8 * (linear + embedding) + rest,
        tied_dynamic_bytes=INT8 * linear + rest,
    )
