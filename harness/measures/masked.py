"""What an encoder puts at masked positions, beside what the unquantized model puts there.

Of each sentence 15 % of the tokens (Devlin et al. 2019; special ones excepted, at least one) are
drawn once and all replaced by the mask token: the published training leaves a fifth of them as they
are or exchanges them, which would be noise here. At these positions the divergence is that of
`harness.measures.divergence`, over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from harness.context import Context
from harness.encoder_text import Sentences, padded, sentences_of
from harness.measures.divergence import token_divergence
from harness.measures.embedding import check_sentence_options, rows_at_once
from harness.measures.statistics import stderr_of_mean
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.encoders import FILL, Filling

KIND = "masked"
SHARE = 0.15


@dataclass(frozen=True)
class Masked:
    """Predictions at masked positions of the first sentences of the evaluation text.

    Attributes:
        sentences: how many.
        batch_size: sentences read at once, as for `harness.measures.embedding`.
    """

    sentences: int = 64
    batch_size: int = 8

    quality: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({FILL})

    def __post_init__(self) -> None:
        check_sentence_options("masked", self.sentences, self.batch_size)

    def prepare(self, reference: Engine, context: Context) -> None:
        """Keep the reference's logits at the masked positions, float32 [masked, V].

        Raises:
            ConfigError: they are not finite.
        """
        sentences = sentences_of(context, self.sentences, reference.context_length)

        def build() -> dict[str, Tensor]:
            logits = torch.cat([one for one, _ in self._fill(reference, sentences, context)])
            if not bool(torch.isfinite(logits).all()):
                raise ConfigError(
                    "the unquantized model's logits hold NaN or infinity, so nothing can be "
                    "compared with them; the checkpoint is broken"
                )
            return {"logits": logits}

        context.keep_reference(KIND, self._key(sentences, context), build)

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return divergence, agreement, accuracy and perplexity; samples are one a sentence."""
        sentences = sentences_of(context, self.sentences, engine.context_length)
        expected = context.reference(KIND, self._key(sentences, context))["logits"]
        means: dict[str, list[float]] = {}
        losses: list[Tensor] = []
        start = 0
        for logits, targets in self._fill(engine, sentences, context):
            reference = expected[start : start + len(logits)]
            start += len(logits)
            found = token_divergence(reference, logits, targets)
            losses.append(-logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0])
            right = (logits.argmax(-1) == targets).double()
            of = {
                "masked_kl": found.kl,
                "masked_top1_agreement": found.agree,
                "masked_accuracy": right,
            }
            for metric, tokens in of.items():
                means.setdefault(metric, []).append(float(tokens.mean()))
        return _values(sentences.protocol, means, torch.cat(losses))

    def _key(self, sentences: Sentences, context: Context) -> list[Any]:
        return [sentences.digest, SHARE, context.seed]

    def _fill(
        self, engine: Engine, sentences: Sentences, context: Context
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each sentence, logits float32 [masked, V] and targets int64 [masked]."""
        filler = cast(Filling, engine)
        mask = _mask_token(context.tokenizer)
        places = masked_places(sentences, set(context.tokenizer.all_special_ids), context.seed)
        size = rows_at_once(filler, self.batch_size)
        for start in range(0, len(sentences.ids), size):
            whole = sentences.ids[start : start + size]
            chosen = places[start : start + size]
            holed = [
                [mask if at in own else token for at, token in enumerate(row)]
                for row, own in zip(whole, chosen, strict=True)
            ]
            logits = filler.fill(*padded(holed, sentences.pad)).cpu()
            for index, (row, own) in enumerate(zip(whole, chosen, strict=True)):
                yield logits[index, own], torch.tensor([row[at] for at in own])


def masked_places(sentences: Sentences, special: set[int], seed: int) -> list[list[int]]:
    """Return the drawn positions of each sentence, ascending; none holds a `special` token."""
    generator = torch.Generator().manual_seed(seed)
    places = []
    for row in sentences.ids:
        free = [at for at, token in enumerate(row) if token not in special]
        count = max(1, round(SHARE * len(free)))
        drawn = torch.randperm(len(free), generator=generator)[:count].tolist()
        places.append(sorted(free[at] for at in drawn))
    return places


def _mask_token(tokenizer: Any) -> int:
    token = tokenizer.mask_token_id
    if token is None:
        raise ConfigError(
            "the model's tokenizer has no mask token, so nothing can be masked; take the tokenizer "
            "the model was trained with"
        )
    return int(token)


def _values(protocol: str, means: dict[str, list[float]], losses: Tensor) -> list[Value]:
    protocol = f"{protocol}_masked{round(100 * SHARE)}"
    units = {
        "masked_kl": ("nats", False),
        "masked_top1_agreement": ("share", True),
        "masked_accuracy": ("share", True),
    }
    values = []
    for metric, (unit, higher) in units.items():
        of = means[metric]
        mean = sum(of) / len(of)
        error = stderr_of_mean(of)
        values.append(Value("masked", metric, protocol, mean, unit, higher, error, tuple(of)))
    mean_loss = float(losses.mean())
    perplexity = math.exp(mean_loss) if mean_loss < 700 else math.inf
    values.append(Value("masked", "masked_perplexity", protocol, perplexity, "perplexity", False))
    return values
