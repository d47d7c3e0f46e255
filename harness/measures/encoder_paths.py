"""Whether an encoder's packed kernels compute what the stored weights say.

The artefact is loaded a second time with every matrix dequantized at each call, and the last hidden
states of both are compared: `harness.measures.paths` for a model without a next token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from harness.context import Context
from harness.encoder_text import sentences_of
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.encoders import EMBED, Encoding
from methods.engine import relative_difference
from methods.packed import PathDisagreementError


@dataclass(frozen=True)
class EncoderPaths:
    """Compares packed and dequantized hidden states; a disagreement fails the cell.

    Attributes:
        tokens: length of the sequence that is read: sentences of the text, one after another.
    """

    tokens: int = 64

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({EMBED})
    decisive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"paths' tokens is {self.tokens}; it must be 1 or more")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the relative difference; nothing for a method with one path only.

        Raises:
            PathDisagreementError: it is above the method's named tolerance.
        """
        if context.dequantized is None:
            return []
        other, tolerance = context.dequantized()
        ids = self._ids(engine, context)
        mask = torch.ones_like(ids)
        try:
            found, expected = (cast(Encoding, one).encode(ids, mask) for one in (engine, other))
        finally:
            other.close()
        difference = relative_difference(found, expected)
        # Written so that NaN, too, is a disagreement.
        if not difference <= tolerance:
            raise PathDisagreementError(
                "hidden states of the packed and the dequantized weights differ by "
                f"{difference:.3g} of their size; {tolerance:.3g} is tolerated"
            )
        tokens = ids.shape[1]
        context.details["paths"] = {"tolerance": tolerance, "tokens": tokens}
        protocol = f"tokens{tokens}"
        return [Value("paths", "path_difference_hidden", protocol, difference, "ratio", False)]

    def _ids(self, engine: Engine, context: Context) -> torch.Tensor:
        """Return int64 [1, tokens]: the first sentences of the text, or drawn without one."""
        length = min(self.tokens, engine.context_length)
        if context.tokenizer is None:
            generator = torch.Generator().manual_seed(context.seed)
            return torch.randint(engine.vocab_size, (1, length), generator=generator)
        sentences = sentences_of(context, length, engine.context_length)
        return torch.tensor([[token for row in sentences.ids for token in row][:length]])
