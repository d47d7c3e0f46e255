"""How far an encoder's sentence embeddings are from the unquantized model's.

The cosine of each sentence's two embeddings; and what a search would notice: whether sentences
stand in the same order of similarity to one another (Spearman's rank correlation over the cosines
of all pairs), and whether each has the same nearest neighbour among the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from harness.context import Context
from harness.encoder_text import FEWEST, Sentences, sentences_of
from harness.measures.statistics import stderr_of_mean
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.encoders import EMBED, Encoding

KIND = "embeddings"


def check_sentence_options(owner: str, sentences: int, batch_size: int) -> None:
    """Raise ConfigError where an option of a measure over sentences makes no sense."""
    if sentences < FEWEST:
        raise ConfigError(f"{owner}'s sentences is {sentences}; it must be {FEWEST} or more")
    if batch_size < 1:
        raise ConfigError(f"{owner}'s batch_size is {batch_size}; it must be 1 or more")


def rows_at_once(engine: Encoding, batch_size: int) -> int:
    """Return how many sentences are read at once: one where they would influence each other."""
    return 1 if engine.couples_rows else batch_size


@dataclass(frozen=True)
class Embedding:
    """Sentence embeddings beside those of the unquantized model.

    Attributes:
        sentences: how many, from the start of the evaluation text.
        batch_size: sentences read at once, padded; one by one where the engine takes one scale for
            the activations of a whole call.
    """

    sentences: int = 128
    batch_size: int = 16

    quality: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({EMBED})

    def __post_init__(self) -> None:
        check_sentence_options("embedding", self.sentences, self.batch_size)

    def prepare(self, reference: Engine, context: Context) -> None:
        """Keep the reference's embeddings.

        Raises:
            ConfigError: they are not finite.
        """
        sentences = sentences_of(context, self.sentences, reference.context_length)

        def build() -> dict[str, Tensor]:
            found = self._embed(reference, sentences)
            if not bool(torch.isfinite(found).all()):
                raise ConfigError(
                    "the unquantized model's embeddings hold NaN or infinity, so nothing can be "
                    "compared with them; the checkpoint is broken"
                )
            return {"embeddings": found}

        context.keep_reference(KIND, sentences.digest, build)

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the agreements; samples are one a sentence.

        A sentence whose embedding is NaN or infinite counts with cosine 0 to everything.
        """
        sentences = sentences_of(context, self.sentences, engine.context_length)
        expected = context.reference(KIND, sentences.digest)["embeddings"]
        found = self._embed(engine, sentences)
        broken = ~torch.isfinite(found).all(-1)
        found = found.masked_fill(broken[:, None], 0.0)
        cosines = functional.cosine_similarity(found.double(), expected.double(), dim=-1)
        ours, theirs = _similarities(found), _similarities(expected)
        same = (_nearest(ours) == _nearest(theirs)) & ~broken
        protocol = sentences.protocol
        return [
            _of_sentences("embedding_cosine", protocol, cosines, "cosine"),
            _value("embedding_cosine_worst", protocol, float(cosines.min()), "cosine"),
            _value("similarity_rank_agreement", protocol, _rank(ours, theirs), "correlation"),
            _of_sentences("nearest_neighbour_agreement", protocol, same.double(), "share"),
        ]

    def _embed(self, engine: Engine, sentences: Sentences) -> Tensor:
        """Return float32 [sentences, H] on the CPU."""
        encoder = cast(Encoding, engine)
        size = rows_at_once(encoder, self.batch_size)
        return torch.cat([encoder.embed(*batch).cpu() for batch in sentences.batches(size)])


def _similarities(embeddings: Tensor) -> Tensor:
    """Return the cosines of all pairs, float64 [n, n]."""
    unit = functional.normalize(embeddings.double(), dim=-1)
    return unit @ unit.T


def _nearest(similarities: Tensor) -> Tensor:
    """Return the most similar other sentence of each, int64 [n]."""
    return similarities.clone().fill_diagonal_(-torch.inf).argmax(-1)


def _rank(ours: Tensor, theirs: Tensor) -> float:
    """Return Spearman's correlation over the pairs; 0 where one side is constant."""
    above = torch.triu_indices(len(ours), len(ours), 1)
    one, other = ours[above[0], above[1]], theirs[above[0], above[1]]
    if one.min() == one.max() or other.min() == other.max():
        return 0.0
    found: Any = spearmanr(one.numpy(), other.numpy())
    return float(found.statistic)


def _value(metric: str, protocol: str, value: float, unit: str) -> Value:
    return Value("embedding", metric, protocol, value, unit, True)


def _of_sentences(metric: str, protocol: str, of: Tensor, unit: str) -> Value:
    samples = tuple(of.tolist())
    mean = float(of.mean())
    stderr = stderr_of_mean(samples)
    return Value("embedding", metric, protocol, mean, unit, True, stderr, samples)
