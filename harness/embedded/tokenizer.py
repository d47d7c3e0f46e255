"""The tokenizer of the embedded demonstration model: a byte-level BPE trained on generated text.

Source: Sennrich et al. 2016 through the `tokenizers` library. Any text can be written, since all
bytes are in the vocabulary; digits stand alone; `<s>` (0) is put in front of a text and `</s>` (1)
ends a document in training.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from harness.embedded.generate import documents

BOS, EOS = "<s>", "</s>"
# A letter that names a choice is a token of its own, apart from the words that begin with it.
SPACE_BEFORE_LETTER = r" (?=[A-D]\b)"
SEED, DOCUMENTS = 10_000_000, 30_000


def make_tokenizer(vocabulary: int, count: int = DOCUMENTS) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on generated text; digits stand alone and `<s>` is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(SPACE_BEFORE_LETTER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(SEED, count), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )
