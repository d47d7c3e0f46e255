"""What the two INT8 methods share: the linear maps they cover.

Both run integer kernels over whole linear maps. No such kernel takes one expert out of a stack, so
experts stored as three-dimensional parameters are left out, and the record says so.
"""

from __future__ import annotations

from typing import Any

from methods.layers import Scope, is_tied

DEQUANTIZED = "to(float64) + torch.matmul"
"""What multiplies where the integer kernel does not: the same rounded values, summed exactly, as
32-bit integers are. In float32 a last bit would tip the next layer's rounding now and then."""

PATH_TOLERANCE = 0.2
"""Largest difference between the logits of the integer kernels and of the dequantized weights, for
`methods.packed.compare_paths`. It is none at all where a kernel scales its sums in the order
assumed here (x86 with VNNI: fbgemm and oneDNN alike). Elsewhere a last bit tips a rounding of
activations now and then, and each tip costs a whole step of 8 bits: in a small model up to 0.06 in
prefill and 0.11 in decode. A wrong layout or zero point gives 1 and more."""

STACKED_EXPERTS = "stack of experts: the INT8 kernels take whole linear maps"


def untie(model: Any, scope: Scope) -> list[str]:
    """Where head and embedding are one matrix that `scope` takes apart, say so and store both.

    `model.config` is changed, so that the artefact does not tie them again.
    """
    if not is_tied(model) or not (scope.head or scope.embeddings):
        return []
    model.config.tie_word_embeddings = False
    kinds = ["INT8" if inside else "float" for inside in (scope.head, scope.embeddings)]
    return [
        "head and embedding were one parameter and are now stored apart: "
        f"the head in {kinds[0]}, the embedding in {kinds[1]}"
    ]
