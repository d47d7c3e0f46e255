"""Every method as a user runs it: one sweep over a tiny model, real libraries, real files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.record import Record
from tests.architectures import BOS_ID, VOCABULARY, tiny_tokenizer
from tests.test_run import ROOT, Done, quantbench, records

NOT_HERE = {
    "auto_gptq": "needs a CUDA card",
    "auto_awq": "needs an environment of its own: tests/methods/test_legacy.py",
    "checkpoint": "takes a quantized model: below",
    "server": "needs a running server: tests/methods/test_server.py",
    "gguf_server": "answers other measures: tests/methods/test_gguf_server.py",
}
TRAINED = {"distill_quant", "lsq", "qat"}
"""Methods with an option for the steps of their training, which default to minutes."""
METHODS = [path.stem for path in sorted((ROOT / "conf" / "method").glob("*.yaml"))]
SIMULATED = {"eetq"}


def row_name(method: str) -> str:
    """Return what tables call a method: llama.cpp's types are methods of their own."""
    return method.replace("gguf", "gguf_Q4_K_M")


def write_model(folder: Path) -> None:
    """Write a Llama that every method takes: widths of 64 and 128, a context of 512."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_text(path: Path, seed: int) -> None:
    words = random.Random(seed)
    path.write_text(" ".join(f"word{words.randrange(1000)}" for _ in range(4000)))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Run every method that can run here, once."""
    folder = tmp_path_factory.mktemp("methods")
    write_model(folder / "model")
    write_text(folder / "scored.txt", 1)
    write_text(folder / "shown.txt", 2)
    common = (
        "bits=4",
        "group_size=32",
        "model=local",
        f"model.path={folder / 'model'}",
        "data.source=text",
        f"data.path={folder / 'scored.txt'}",
        f"data.calibration={folder / 'shown.txt'}",
        "suite=smoke",
        "~suite.measures.speed",
        f"runs_dir={folder / 'runs'}",
    )
    few = ("++method.training.steps=2", "++method.training.warmup=0")
    trained = quantbench("-m", f"method={','.join(sorted(TRAINED))}", *few, *common)
    assert trained.code == 0, trained.out
    others = [name for name in METHODS if name not in {*NOT_HERE, *TRAINED}]
    return folder, quantbench("-m", f"method={','.join(others)}", *common)


def by_method(folder: Path) -> dict[str, Record]:
    return {str(r.config["method"]): r for r in records(folder / "runs").values()}


def test_every_method_runs_from_the_command_line(swept: tuple[Path, Done]) -> None:
    folder, done = swept
    assert done.code == 0, done.out
    found = by_method(folder)
    assert set(found) == {row_name(name) for name in set(METHODS) - set(NOT_HERE)}
    assert {record.status for record in found.values()} == {"ok"}


def test_every_row_says_which_kernel_ran_what(swept: tuple[Path, Done]) -> None:
    for name, record in by_method(swept[0]).items():
        assert record.details["kernels"], name
        assert all(entry["kernel"] for entry in record.details["kernels"]), name
        weights = sum(entry["weights"] for entry in record.details["kernels"])
        assert weights == record.details["coverage"]["quantized_weights"], name
        assert (record.details["execution"] == "simulated") == (name in SIMULATED), name


def test_every_row_has_the_figures_it_can_have(swept: tuple[Path, Done]) -> None:
    for name, record in by_method(swept[0]).items():
        metrics = {value.metric for value in record.values}
        assert {"perplexity", "kl_mean", "quantize_seconds"} <= metrics, name
        assert ("bits_per_weight" in metrics) == (name not in SIMULATED), name


def test_what_was_calibrated_on_is_recorded(swept: tuple[Path, Done]) -> None:
    found = by_method(swept[0])
    shown = {name: record.details["calibration"] for name, record in found.items()}
    calibrated = {name for name, entry in shown.items() if entry is not None}
    assert {"gptq", "awq", "smoothquant", "rptq", "auto_round", "int8_static"} <= calibrated
    assert not calibrated & {"rtn", "nf4", "hqq", "w8a8", "fp8", "bitnet", "fp32"}
    assert len({entry["digest"] for entry in shown.values() if entry}) == 1
    assert all(str(entry["text"]).endswith("shown.txt") for entry in shown.values() if entry)


@pytest.mark.parametrize("method", ["gptq", "nf4", "w8a8", "gguf_Q4_K_M"])
def test_what_a_method_wrote_is_a_checkpoint_for_others(
    method: str, swept: tuple[Path, Done], tmp_path: Path
) -> None:
    folder = swept[0]
    made = by_method(folder)[method]
    artefact = folder / "runs" / made.cell / "artefact"
    is_file = method.startswith("gguf")
    done = quantbench(
        "method=checkpoint",
        f"model={'gguf' if is_file else 'local'}",
        f"model.path={artefact / 'model.gguf' if is_file else artefact}",
        "data.source=text",
        f"data.path={folder / 'scored.txt'}",
        "suite=smoke",
        "~suite.measures.speed",
        f"runs_dir={tmp_path}",
    )
    assert done.code == 0, done.out
    (record,) = records(tmp_path).values()
    assert record.config["bits"] == made.config["bits"]
    figures = {(v.metric, v.protocol): v.value for v in record.values}
    for value in made.values:
        if value.metric in ("perplexity", "bits_per_weight"):
            assert figures[value.metric, value.protocol] == pytest.approx(value.value, rel=1e-6)
    assert not any(metric == "kl_mean" for metric, _ in figures)
    notes = " ".join(record.details["notes"])
    assert "divergence not measured: there is no unquantized model to compare with" in notes


def test_a_gguf_file_is_compared_with_its_original(
    swept: tuple[Path, Done], tmp_path: Path
) -> None:
    folder = swept[0]
    made = by_method(folder)["gguf_Q4_K_M"]
    done = quantbench(
        "method=checkpoint",
        "model=gguf",
        f"model.path={folder / 'runs' / made.cell / 'artefact' / 'model.gguf'}",
        f"model.reference={folder / 'model'}",
        "data.source=text",
        f"data.path={folder / 'scored.txt'}",
        "suite=smoke",
        "~suite.measures.speed",
        f"runs_dir={tmp_path}",
    )
    assert done.code == 0, done.out
    found = {str(record.config["method"]): record for record in records(tmp_path).values()}
    assert set(found) == {"fp32", "checkpoint"}
    for metric in ("kl_mean", "perplexity", "bits_per_weight", "quantized_bytes", "equal_tokens"):
        (own,) = [v.value for v in found["checkpoint"].values if v.metric == metric][:1]
        (theirs,) = [v.value for v in made.values if v.metric == metric][:1]
        assert own == pytest.approx(theirs, rel=1e-6), metric


def test_a_missing_library_fails_its_own_cells_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['hqq'] = None\n")
    done = quantbench(
        "-m",
        "method=rtn,hqq",
        "bits=4",
        "group_size=32",
        "suite=size_only",
        f"runs_dir={tmp_path / 'sizes'}",
        env={"PYTHONPATH": str(tmp_path)},
    )
    # By arithmetic no library is needed.
    assert done.code == 0
    done = quantbench(
        "-m",
        "method=rtn,hqq",
        "bits=4",
        "group_size=32",
        "suite=smoke",
        f"runs_dir={tmp_path / 'runs'}",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.code == 1
    found = by_method(tmp_path)
    assert (found["rtn"].status, found["hqq"].status) == ("ok", "failed")
    (error,) = found["hqq"].errors
    assert "pip install --constraint constraints.txt hqq" in error.message


def test_a_value_that_a_method_cannot_do_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = quantbench("-m", "method=gptq,zeroquant", "bits=4,3", f"runs_dir={tmp_path}")
    assert done.code == 2
    assert done.errors == [
        "error: zeroquant has weights of 8 or 4 bits, not 3; set bits=8 or bits=4"
    ]
    assert not records(tmp_path)


def test_methods_without_a_choice_of_bits_are_one_cell(tmp_path: Path) -> None:
    done = quantbench(
        "-m",
        "method=nf4,bitnet,awq",
        "bits=8,4,2",
        "group_size=32,128",
        "suite=size_only",
        f"runs_dir={tmp_path}",
    )
    assert done.code == 0, done.err
    cells = [
        (r.config["method"], r.config["bits"], r.config["group_size"])
        for r in records(tmp_path).values()
    ]
    rounded = sorted((name, round(bits, 2), size) for name, bits, size in cells)
    assert [entry for entry in rounded if entry[0] != "fp32"] == [
        ("awq", 4, 32),
        ("awq", 4, 128),
        ("bitnet", 1.58, None),
        ("nf4", 4, 64),
    ]
