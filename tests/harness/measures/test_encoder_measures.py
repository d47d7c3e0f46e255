from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from harness.cache import Cache
from harness.context import Context
from harness.data import TextFile
from harness.encoder_text import frame, padded, sentences_of, split
from harness.measures.embedding import Embedding
from harness.measures.encoder_paths import EncoderPaths
from harness.measures.latency import Latency
from harness.measures.loading import Loading
from harness.measures.masked import Masked, masked_places
from harness.measures.memory import Memory
from kernels.errors import ConfigError
from methods.encoder_engine import EncoderEngine
from methods.packed import PathDisagreementError
from methods.rtn import RTN
from tests.encoders import CLS, SEP, encoder_tokenizer, tiny_encoder
from tests.harness.measures.surroundings import CPU, BigramEngine, by_metric, drawn_table

TEXT = "\n".join(
    f"{who} {does} the {what} in the {where}. It was {how}!"
    for who, what, where, how in (
        ("anna", "dog", "yard", "late in may"),
        ("ben", "old cat", "wood", "warm and dry"),
        ("carl", "ox", "field by the lake", "not her day"),
        ("dora", "black bird", "tree", "as it has to be"),
    )
    for does in ("sees", "feeds", "calls")
)


def context_of(folder: Path, text: str = TEXT) -> Context:
    path = folder / "text.txt"
    path.write_text(text)
    tokenizer, cache = encoder_tokenizer(), Cache(folder / "cache")
    source = TextFile("text", "mine", str(path))
    return Context(
        tokenizer=tokenizer,
        texts=source.texts(tokenizer, cache),
        hardware=CPU,
        artefact=folder / "artefact",
        cache=cache,
        model_key="a model",
        random_weights=False,
        seed=7,
    )


def engine_of(kind: str, noise: float = 0.0) -> EncoderEngine:
    model = tiny_encoder(kind)
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)
    return EncoderEngine(model, "cpu", [])


def test_sentences_are_cut_and_counted(tmp_path: Path) -> None:
    assert split(["One is. Two is? three\n\nOne is.", " x "]) == [
        "One is.",
        "Two is?",
        "three",
        "x",
    ]
    context = context_of(tmp_path, "no.\n" + TEXT + " " + "word " * 200)
    found = sentences_of(context, 100, 60)
    assert found.protocol == f"mine_sentences{len(found.ids)}"
    assert all(row[0] == CLS and row[-1] == SEP and 8 <= len(row) <= 60 for row in found.ids)
    assert len(sentences_of(context, 5, 60).ids) == 5
    assert sentences_of(context, 5, 60).digest != found.digest
    with pytest.raises(ConfigError, match=r"text 'mine' has 1 sentences of 8 to 60 tokens, and at"):
        sentences_of(context_of(tmp_path, "too short a text."), 5, 60)


def test_padding_and_frames() -> None:
    ids, mask = padded([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    crops = torch.arange(10, 22).view(2, 6)
    framed = frame(crops, encoder_tokenizer())
    assert framed[:, 0].tolist() == [CLS, CLS]
    assert framed[:, -1].tolist() == [SEP, SEP]
    assert torch.equal(framed[:, 1:-1], crops[:, 1:-1])


def test_embeddings_of_the_same_model_agree(tmp_path: Path) -> None:
    context, measure = context_of(tmp_path), Embedding(sentences=12, batch_size=5)
    measure.prepare(engine_of("bert"), context)
    found = by_metric(measure.run(engine_of("bert"), context))
    assert found["embedding_cosine"].value == pytest.approx(1.0)
    assert len(found["embedding_cosine"].samples) == 12
    assert found["embedding_cosine"].protocol == "mine_sentences12"
    assert found["similarity_rank_agreement"].value == pytest.approx(1.0)
    assert found["nearest_neighbour_agreement"].value == 1.0
    assert all(value.higher_is_better for value in found.values())


def test_embeddings_of_another_model_do_not(tmp_path: Path) -> None:
    context, measure = context_of(tmp_path), Embedding(sentences=12)
    measure.prepare(engine_of("bert"), context)
    near = by_metric(measure.run(engine_of("bert", 0.01), context))
    far = by_metric(measure.run(engine_of("bert", 0.3), context))
    for metric in ("embedding_cosine", "embedding_cosine_worst", "similarity_rank_agreement"):
        assert far[metric].value < near[metric].value < 1
    cosines = near["embedding_cosine"]
    assert cosines.value == pytest.approx(sum(cosines.samples) / 12)
    assert near["embedding_cosine_worst"].value == min(cosines.samples)


class Broken(EncoderEngine):
    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.full((len(input_ids), 32), torch.nan)


def test_a_broken_engine_cannot_look_good(tmp_path: Path) -> None:
    context, measure = context_of(tmp_path), Embedding(sentences=12)
    broken = Broken(tiny_encoder("bert"), "cpu", [])
    with pytest.raises(ConfigError, match="hold NaN or infinity"):
        measure.prepare(broken, context)
    measure.prepare(engine_of("bert"), context)
    assert {value.value for value in measure.run(broken, context)} == {0.0}


class Counting(EncoderEngine):
    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.rows = len(input_ids)
        return super().embed(input_ids, attention_mask)


def test_rows_that_influence_each_other_are_read_alone(tmp_path: Path) -> None:
    context, measure = context_of(tmp_path), Embedding(sentences=12, batch_size=6)
    measure.prepare(engine_of("bert"), context)
    for couples, rows in ((True, 1), (False, 6)):
        engine = Counting(tiny_encoder("bert"), "cpu", [], couples_rows=couples)
        measure.run(engine, context)
        assert engine.rows == rows


@pytest.mark.parametrize("kind", ["bert_masked", "roberta", "distilbert"])
def test_masked_positions(kind: str, tmp_path: Path) -> None:
    context, measure = context_of(tmp_path), Masked(sentences=12, batch_size=5)
    reference = engine_of(kind)
    measure.prepare(reference, context)
    same = by_metric(measure.run(reference, context))
    assert same["masked_kl"].value == pytest.approx(0.0, abs=1e-9)
    assert same["masked_top1_agreement"].value == 1.0
    assert same["masked_kl"].protocol == "mine_sentences12_masked15"
    assert len(same["masked_kl"].samples) == 12
    other = by_metric(measure.run(engine_of(kind, 0.1), context))
    assert other["masked_kl"].value > 1e-3
    sentences = sentences_of(context, 12, 64)
    special = set(context.tokenizer.all_special_ids)
    places = masked_places(sentences, special, 7)
    losses = []
    for row, own in zip(sentences.ids, places, strict=True):
        assert 1 <= len(own) <= 0.2 * len(row)
        assert not special & {row[at] for at in own}
        holed = torch.tensor([[4 if at in own else token for at, token in enumerate(row)]])
        logits = reference.fill(holed, torch.ones_like(holed))[0].log_softmax(-1)
        losses += [-float(logits[at, row[at]]) for at in own]
    expected = math.exp(sum(losses) / len(losses))
    assert same["masked_perplexity"].value == pytest.approx(expected, rel=1e-4)
    context.tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="tokenizer has no mask token"):
        measure.run(reference, context)


def test_latency_takes_turns(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    context.baseline = lambda: engine_of("bert")
    measure = Latency(lengths=(8, 16), batches=(1, 2), repeats=3, warmup=1)
    found = measure.run(engine_of("bert"), context)
    assert {value.protocol for value in found} == {
        f"length{length}_batch{batch}" for length in (8, 16) for batch in (1, 2)
    }
    for value in found:
        if value.metric in ("latency_seconds", "latency_speedup"):
            assert len(value.samples) == 3
            assert min(value.samples) > 0
    of = {(value.metric, value.protocol): value.value for value in found}
    seconds, rate = "latency_seconds", "sequences_per_second"
    for protocol, batch in (("length8_batch1", 1), ("length16_batch2", 2)):
        assert of[rate, protocol] == pytest.approx(batch / of[seconds, protocol])
    assert context.details["latency"]["interleaved_with_baseline"]
    with pytest.raises(ConfigError, match="lengths has 65, but the model reads at most 64 tokens"):
        Latency(lengths=(65,)).run(engine_of("bert"), context)


def test_memory_and_loading_of_an_encoder(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    context.loaders = {"": lambda: engine_of("bert")}
    memory = Memory(depth=64).run(engine_of("bert"), context)
    assert [value.metric for value in memory] == ["peak_memory_bytes"]
    with pytest.raises(ConfigError, match=r"reads at most 64 tokens$"):
        Memory(depth=65).run(engine_of("bert"), context)
    loading = Loading(repeats=2).run(engine_of("bert"), context)
    assert [value.metric for value in loading] == ["load_seconds", "first_embedding_seconds"]


def test_paths_are_held_against_each_other(tmp_path: Path) -> None:
    method = RTN("rtn", 8, 32)
    context = context_of(tmp_path)
    method.quantize(tiny_encoder("bert"), None, None, context.artefact)
    engine = method.load(context.artefact, CPU)
    measure = EncoderPaths(tokens=40)
    assert measure.run(engine, context) == []
    context.dequantized = lambda: (method.load_dequantized(context.artefact, CPU), 0.05)
    (value,) = measure.run(engine, context)
    assert value.metric == "path_difference_hidden"
    assert value.protocol == "tokens40"
    assert 0 <= value.value <= 0.05
    context.dequantized = lambda: (engine_of("bert", 0.2), 0.05)
    with pytest.raises(PathDisagreementError, match="hidden states of the packed"):
        measure.run(engine, context)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Embedding(sentences=3), "embedding's sentences is 3; it must be 4 or more"),
        (lambda: Masked(batch_size=0), "masked's batch_size is 0; it must be 1 or more"),
        (lambda: Latency(lengths=()), r"latency's lengths is \[\]"),
        (lambda: Latency(batches=(0,)), r"latency's batches is \[0\]"),
        (lambda: Latency(repeats=0), "latency's repeats is 0"),
        (lambda: EncoderPaths(tokens=0), "paths' tokens is 0"),
    ],
)
def test_options_that_make_no_sense(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_causal_engine_lacks_what_they_need() -> None:
    engine = cast(Any, BigramEngine(drawn_table(8)))
    for measure in (Embedding(), Masked(), Latency(), EncoderPaths()):
        assert measure.needs - engine.capabilities
