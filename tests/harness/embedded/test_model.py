"""The committed weights: small, in the promised shape, and good enough to lose something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.embedded.generate import FOLDER
from harness.embedded.tasks import FOLDER as TASKS
from harness.embedded.tasks import NAMES
from harness.task_index import parts_of, registry_of

MODEL = FOLDER / "model"
LIMIT = 60


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_weights_are_8_megabytes_at_most() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000


def test_every_matrix_of_the_decoder_blocks_divides_by_256(model: Any) -> None:
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(m.in_features % 256 == 0 and m.out_features % 256 == 0 for m in linears)
    assert model.config.max_position_embeddings >= 1024


def test_tokenizer_puts_one_bos_and_keeps_any_text(tokenizer: Any) -> None:
    text = "Mira Holt has 17 figs. Ünï ☃\n"
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 1024


def test_perplexity_of_held_out_text_is_low(model: Any, tokenizer: Any) -> None:
    text = (FOLDER / "data" / "eval.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text).input_ids[: 4 * 1024]).view(4, 1024)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert float(loss.exp()) < 3.0


def embedded_tasks(cache: Path) -> list[dict[str, Any]]:
    """The definitions as lm-eval takes them, with their data files absolute."""
    registry = registry_of(NAMES, parts_of(NAMES, None, cache), None, cache)
    return [registry[name].cfg for name in NAMES]


def test_task_configurations_name_files_that_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir("/")
    configs = embedded_tasks(tmp_path)
    assert tuple(config["task"] for config in configs) == NAMES
    for config in configs:
        for path in config["dataset_kwargs"]["data_files"].values():
            assert Path(path).is_absolute()
            assert Path(path).is_file()
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(NAMES)


def test_fp32_scores_reach_what_the_project_promises(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=20, device="cpu")
    manager = TaskManager(include_defaults=False)
    results = simple_evaluate(
        lm, tasks=embedded_tasks(tmp_path), limit=LIMIT, task_manager=manager, bootstrap_iters=0
    )["results"]
    assert results["embedded_endings"]["acc_norm,none"] >= 0.8
    assert results["embedded_facts"]["acc,none"] >= 0.8
    assert results["embedded_sums"]["exact_match,strict-match"] >= 0.6
