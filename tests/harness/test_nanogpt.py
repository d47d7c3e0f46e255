"""A nanoGPT checkpoint as a model: read without running it, converted exactly, refused in words."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness.cache import Cache
from harness.data import TextFile, encode, leading_token
from harness.load import load_model
from harness.nanogpt import NanoGptModel, nanogpt_model
from harness.nanogpt_network import Network, Shape
from harness.nanogpt_train import Plan, train
from harness.nanogpt_vocabulary import read_meta, write_meta
from kernels.errors import ConfigError
from methods.rtn import RTN

ROOT = Path(__file__).resolve().parents[2]
CHARACTERS = ["\n", " ", "!", "-", "B", "a", "b", "c", "é", "日"]
TEXT = "a b\n\nc-B  é!\n 日a\n"
TOLERANCE = 2e-4
"""Of logits of some tens: rounding of float32 through two layers, in another order of sums."""


def shape(**changes: Any) -> Shape:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "vocab_size": 10}
    values: dict[str, Any] = {**sizes, "bias": False, "dropout": 0.1, **changes}
    return Shape(**values)


def network(wanted: Shape) -> Network:
    torch.manual_seed(0)
    made = Network(wanted).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        # Larger than fresh weights, so that the two kinds of GELU differ visibly.
        parameter.copy_(torch.randn(parameter.shape) * 0.3 + name.endswith("ln_f.weight"))
    return made


def content(made: Network, **changes: Any) -> dict[str, Any]:
    return {
        "model": made.state_dict(),
        "model_args": asdict(made.shape),
        "optimizer": {"state": {}, "param_groups": []},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "x"},
        **changes,
    }


def files(folder: Path, **changes: Any) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    torch.save(content(network(shape()), **changes), folder / "ckpt.pt")
    write_meta(CHARACTERS, folder / "meta.pkl")
    return folder / "ckpt.pt", folder / "meta.pkl"


def model_of(folder: Path, **changes: Any) -> NanoGptModel:
    checkpoint, meta = files(folder, **changes)
    return nanogpt_model("nanogpt", str(checkpoint), str(folder / "cache"), str(meta))


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_network(
    tmp_path: Path, bias: bool, prefix: str, tied: bool
) -> None:
    made = network(shape(bias=bias))
    state = made.state_dict()
    if not tied:
        state["lm_head.weight"] = state["lm_head.weight"].flip(0)
        made.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"], requires_grad=False)
    # What old checkpoints hold beside the weights.
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    found, tokenizer = load_model(model_of(tmp_path, model=state, model_args=asdict(made.shape)))
    ids = torch.randint(len(CHARACTERS), (3, 48), generator=torch.Generator().manual_seed(1))
    logits = found(input_ids=ids).logits
    torch.testing.assert_close(logits, made(ids), rtol=0, atol=TOLERANCE)
    found.config.activation_function = "gelu_new"
    other = type(found)(found.config).eval()
    other.load_state_dict(found.state_dict())
    assert (other(input_ids=ids).logits - made(ids)).abs().max() > 5 * TOLERANCE
    assert found.config.max_position_embeddings == 48
    assert tokenizer.decode(encode(tokenizer, TEXT)) == TEXT


@pytest.mark.parametrize("bias", [False, True])
def test_zeros_stand_for_missing_biases_and_are_counted(tmp_path: Path, bias: bool) -> None:
    made = network(shape(bias=bias))
    folder = model_of(tmp_path, model=made.state_dict(), model_args=asdict(made.shape)).folder()
    stored = load_file(folder / "model.safetensors")
    own = sum(parameter.numel() for parameter in made.parameters())
    zeros = json.loads((folder / "config.json").read_text())["nanogpt"]["zero_biases"]
    assert zeros == (0 if bias else (11 * 2 + 1) * 32)
    assert sum(tensor.numel() for tensor in stored.values()) == own + zeros
    assert "lm_head.weight" not in stored


def test_every_character_is_a_token_and_comes_back(tmp_path: Path) -> None:
    _, tokenizer = load_model(model_of(tmp_path))
    ids = encode(tokenizer, TEXT)
    assert ids == [CHARACTERS.index(character) for character in TEXT]
    assert tokenizer(TEXT).input_ids == ids
    assert tokenizer.decode(ids) == TEXT
    assert [tokenizer.decode([id]) for id in range(len(CHARACTERS))] == CHARACTERS
    assert leading_token(tokenizer) is None


def test_a_vocabulary_without_the_letter_a_has_no_leading_token(tmp_path: Path) -> None:
    checkpoint, meta = files(tmp_path)
    write_meta(["1", "2"], meta)
    source = nanogpt_model("nanogpt", str(checkpoint), str(tmp_path / "cache"), str(meta))
    _, tokenizer = load_model(source)
    assert leading_token(tokenizer) is None
    assert encode(tokenizer, "2112") == [1, 0, 0, 1]


def test_characters_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    _, tokenizer = load_model(model_of(tmp_path))
    path = tmp_path / "text.txt"
    path.write_text("a b xyzw")
    texts = TextFile("text", "text", str(path)).texts(tokenizer, Cache(tmp_path))
    sentence = refusal(lambda: texts.tokens("gptq"))
    assert sentence.startswith("the text has 4 characters that the model's vocabulary lacks ('w', ")


def test_identity_is_that_of_the_files_and_the_folder_is_made_once(tmp_path: Path) -> None:
    one, two = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    digests = tmp_path / "digests.json"
    assert one.identity(digests) == two.identity(digests)
    assert one.architecture()["n_positions"] == 48
    assert one.original() is one
    folder = one.folder()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert one.folder() == one.tokenizer_folder() == one.checkpoint() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    write_meta(CHARACTERS[:-1], tmp_path / "two" / "meta.pkl")
    assert two.identity(digests) != one.identity(digests)


def test_the_model_is_a_source_without_torch(tmp_path: Path) -> None:
    checkpoint, meta = files(tmp_path)
    code = (
        "import sys; from harness.nanogpt import nanogpt_model; from pathlib import Path; "
        f"m = nanogpt_model('n', {str(checkpoint)!r}, {str(tmp_path)!r}, {str(meta)!r}); "
        f"m.identity(Path({str(tmp_path / 'd.json')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


class Runs:
    """Says in its pickle that a file shall be made."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_meta_is_refused_and_nothing_of_it_runs(tmp_path: Path, protocol: int) -> None:
    mark, meta = tmp_path / "mark", tmp_path / "meta.pkl"
    plain = {"vocab_size": 1, "stoi": {"a": 0}, "itos": {0: "a"}}
    meta.write_bytes(pickle.dumps({**plain, "more": Runs(mark)}, protocol))
    sentence = refusal(lambda: read_meta(meta))
    assert "is refused: it holds more than dictionaries, strings and numbers" in sentence
    assert "mkdir" in sentence
    assert not mark.exists()
    # The same file does run where a pickle is simply loaded.
    subprocess.run(
        [sys.executable, "-c", f"import pickle; pickle.load(open({str(meta)!r}, 'rb'))"],
        check=True,
        timeout=60,
    )
    assert mark.is_dir()


@pytest.mark.parametrize("more", [Path, print, {1}.__class__, np.float64(1.0)])
def test_harmless_names_are_refused_too(tmp_path: Path, more: Any) -> None:
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps({"stoi": {"a": 0}, "itos": {0: "a"}, "more": more}))
    assert "is refused" in refusal(lambda: read_meta(meta))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "holds no stoi and itos"),
        ({"stoi": {}, "itos": {}}, "holds no stoi and itos"),
        ({"stoi": {"ab": 0}, "itos": {0: "ab"}}, "must map single characters to whole numbers"),
        ({"stoi": {"a": True}, "itos": {True: "a"}}, "must map single characters"),
        ({"stoi": {"a": 0, "b": 0}, "itos": {0: "a"}}, "each for one character"),
        ({"stoi": {"a": 0}, "itos": {0: "b"}}, "itos is not the inverse of stoi"),
    ],
)
def test_a_meta_that_is_no_vocabulary_is_one_sentence(
    tmp_path: Path, given: Any, sentence: str
) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(given))
    assert sentence in refusal(lambda: read_meta(tmp_path / "meta.pkl"))


def test_damaged_large_and_missing_metas_are_one_sentence(tmp_path: Path) -> None:
    meta = tmp_path / "meta.pkl"
    assert "cannot be read: No such file" in refusal(lambda: read_meta(meta))
    # A file that asks for a memo of gigabytes, then nothing; and one that ends early.
    for damaged in (b"\x80\x04", b"", b"text", b"\x80\x04}\x94("):
        meta.write_bytes(damaged)
        assert "cannot be read as a pickle" in refusal(lambda: read_meta(meta))
    with meta.open("wb") as file:
        file.truncate(17 << 20)
    assert "a vocabulary of characters has at most" in refusal(lambda: read_meta(meta))


def test_a_checkpoint_with_more_than_plain_data_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for given, named in (
        ({"best_val_loss": np.float64(1.5)}, "scalar"),
        ({"x": Runs(mark)}, "mkdir"),
    ):
        sentence = refusal(model_of(tmp_path, **given).folder)
        assert "is refused: it holds more than tensors and plain data" in sentence
        assert named in sentence
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("model_args"), "it holds no model and model_args"),
        (lambda c: c["model_args"].update(n_layer=0), "model_args has n_layer 0"),
        (lambda c: c["model_args"].pop("block_size"), "model_args has block_size None"),
        (lambda c: c["model_args"].update(dropout=(0,)), "model_args has dropout (0,)"),
        (lambda c: c["model_args"].update(dropout="0.1"), "model_args has dropout '0.1'"),
        (lambda c: c["model_args"].update(dropout=float("nan")), "model_args has dropout nan"),
        (lambda c: c["model"].pop("transformer.wpe.weight"), "lacks 1 of nanoGPT's tensors"),
        (lambda c: c["model"].update(more=torch.zeros(1)), "holds unknown 1 of nanoGPT's tensors"),
        (lambda c: c["model_args"].update(n_embd=64), "but model_args say [10, 64]"),
        (lambda c: c["model"].update({"transformer.wpe.weight": 3}), "is no tensor"),
        (lambda c: c["model"]["transformer.wpe.weight"].fill_(torch.nan), "wpe.weight holds"),
    ],
)
def test_what_is_no_nanogpt_checkpoint_is_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    made = content(network(shape()))
    change(made)
    source = model_of(tmp_path)
    torch.save(made, tmp_path / "ckpt.pt")
    assert sentence in refusal(source.folder)
    assert not list((tmp_path / "cache").glob("*/config.json"))


def test_files_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    checkpoint, meta = files(tmp_path)
    cache = str(tmp_path / "cache")
    (tmp_path / "empty").mkdir()

    def ask(**given: Any) -> str:
        source = {"name": "n", "checkpoint": str(checkpoint), "cache": cache, **given}
        return refusal(lambda: nanogpt_model(**source).folder())

    assert "there is no file" in ask(checkpoint="nope.pt", meta=str(meta))
    assert "there is no file" in ask(meta=str(tmp_path / "nope.pkl"))
    assert "cannot be read as a file of torch.save" in ask(checkpoint=str(meta), meta=str(meta))
    assert "are both given" in ask(meta=str(meta), tokenizer=str(tmp_path))
    assert "is no folder here and no id" in ask(tokenizer="nope")
    assert "holds no GPT-2 tokenizer" in ask(tokenizer=str(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    assert "it is a model of characters" in ask(tokenizer=str(tmp_path / "empty"))
    write_meta([*CHARACTERS, "z"], meta)
    assert "it has id 10, but the model's vocabulary has 10" in ask(meta=str(meta))


def test_a_model_of_gpt2_tokens_takes_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    from harness.nanogpt_convert import GPT2_TOKENS

    made = network(shape(n_embd=8, n_layer=1, vocab_size=50304))
    checkpoint, _ = files(tmp_path, model=made.state_dict(), model_args=asdict(made.shape))
    folder = tmp_path / "gpt2"
    folder.mkdir()
    # As many entries as GPT-2 has; what stands in them does not matter here.
    table = {"a": 0, "b": 1, "<|endoftext|>": GPT2_TOKENS - 1}
    table |= {f"t{id}": id for id in range(2, GPT2_TOKENS - 1)}
    (folder / "vocab.json").write_text(json.dumps(table))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    source = nanogpt_model("n", str(checkpoint), str(tmp_path / "c"), tokenizer=str(folder))
    assert "tokenizer" in source.identity(tmp_path / "digests.json")
    found, tokenizer = load_model(source)
    assert tokenizer("ab").input_ids == [0, 1]
    assert tokenizer.eos_token_id == found.config.eos_token_id == GPT2_TOKENS - 1
    assert found.config.vocab_size == 50304


def test_it_is_quantized_like_any_model(tmp_path: Path) -> None:
    model, tokenizer = load_model(model_of(tmp_path))
    (tmp_path / "artefact").mkdir()
    report = RTN("rtn", bits=4, group_size=32).quantize(
        model, tokenizer, None, tmp_path / "artefact"
    )
    assert len(report.quantized) == 2 * 4
    assert sum(matrix.weights for matrix in report.quantized) == 2 * 12 * 32**2


def test_training_leaves_what_the_model_reads(tmp_path: Path) -> None:
    text = "the cat sat on the mat.\nthe rat sat too.\n" * 30
    plan = Plan(steps=30, batch=4, layers=1, heads=2, width=32, block_size=16, learning_rate=1e-2)
    loss = train(text, plan, tmp_path / "out")
    assert loss < 0.8 * np.log(len(set(text)))
    assert train(text, plan, tmp_path / "again") == loss
    parts = [(tmp_path / "out" / f"{name}.txt").read_text() for name in ("train", "validation")]
    assert "".join(parts) == text
    out = tmp_path / "out"
    source = nanogpt_model("n", f"{out}/ckpt.pt", str(tmp_path / "c"), f"{out}/meta.pkl")
    model, tokenizer = load_model(source)
    ids = torch.tensor([encode(tokenizer, parts[1])[:16]])
    assert float(model(input_ids=ids, labels=ids).loss) < 0.8 * np.log(len(set(text)))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"heads": 3}, "--width 128 is not divided by --heads 3"),
        ({"steps": 0}, "--steps must be 1 or more"),
    ],
)
def test_plans_that_cannot_work_are_one_sentence(given: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(lambda: replace(Plan(), **given))


def test_a_text_too_short_to_hold_out_a_part_is_refused(tmp_path: Path) -> None:
    assert "--data has 100 characters" in refusal(lambda: train("ab" * 50, Plan(), tmp_path))
