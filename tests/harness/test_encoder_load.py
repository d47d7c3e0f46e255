"""Encoders from a folder, from a package, and what is refused for them before they are loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForPreTraining

from harness import check
from harness.encoder_package import PackageModel
from harness.folders import folder_digest
from harness.load import describes_encoder, load_model, meta_model, model_facts
from harness.models import LocalModel
from kernels.errors import ConfigError
from methods.encoder_engine import EncoderEngine
from tests.encoders import CONFIGS, CONTEXT, batch, tiny_encoder, write_encoder

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize("kind", CONFIGS)
def test_loads_what_the_checkpoint_is(kind: str, tmp_path: Path) -> None:
    written = write_encoder(tmp_path, kind)
    model, tokenizer = load_model(LocalModel("local", str(tmp_path)))
    assert type(model) is type(written)
    assert tokenizer.mask_token == "[MASK]"
    ids, mask = batch()
    expected = EncoderEngine(written, "cpu", []).encode(ids, mask)
    torch.testing.assert_close(EncoderEngine(model, "cpu", []).encode(ids, mask), expected)
    facts = model_facts(model)
    assert facts["context_length"] == CONTEXT - (kind == "roberta")
    assert facts["tied_embeddings"] == (kind != "bert")
    assert type(meta_model(json.loads((tmp_path / "config.json").read_text()))) is type(written)


@pytest.mark.parametrize(
    ("flag", "pooling"), [(None, "mean"), ("mean_tokens", "mean"), ("cls_token", "cls")]
)
def test_pooling_is_what_the_folder_says(flag: str | None, pooling: str, tmp_path: Path) -> None:
    write_encoder(tmp_path, "bert", flag)
    model, _ = load_model(LocalModel("local", str(tmp_path)))
    assert EncoderEngine(model, "cpu", []).pooling == pooling


def test_an_unknown_pooling_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path, "bert", "lasttoken")
    with pytest.raises(ConfigError, match=r"config.json pools by lasttoken; what is known here"):
        load_model(LocalModel("local", str(tmp_path)))


def test_pooling_is_part_of_the_identity(tmp_path: Path) -> None:
    write_encoder(tmp_path, "bert", "cls_token")
    first = folder_digest(tmp_path, False, tmp_path / "digests")
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace("false", "true").replace("true", "false", 1))
    assert folder_digest(tmp_path, False, tmp_path / "digests") != first


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the norms as BERT's published files do."""
    pairs = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in pairs.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def test_heads_of_the_pretraining_are_left(tmp_path: Path) -> None:
    """As google-bert/bert-base-uncased is: a masked-language model by name, with a second head."""
    write_encoder(tmp_path, "bert_masked")
    config = tiny_encoder("bert_masked").config
    torch.manual_seed(0)
    whole = BertForPreTraining(config).eval()
    save_file(
        old_names(dict(load_file(write_whole(whole, tmp_path)))), tmp_path / "model.safetensors"
    )
    model, _ = load_model(LocalModel("local", str(tmp_path)))
    assert type(model).__name__ == "BertForMaskedLM"
    ids, mask = batch()
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask).prediction_logits
    torch.testing.assert_close(EncoderEngine(model, "cpu", []).fill(ids, mask), expected)


def write_whole(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "whole")
    return Path(folder / "whole" / "model.safetensors")


def test_other_unknown_tensors_are_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "classifier.weight": torch.zeros(2, 32)}, path)
    with pytest.raises(ConfigError, match=r"holds unknown 1 tensor: classifier\.weight"):
        load_model(LocalModel("local", str(tmp_path)))


def test_a_package_is_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = PackageModel("small", "carries_a_model", "carries-a-model", "model")
    with pytest.raises(ConfigError, match=r"holds no config.json in model; install it again"):
        source.folder()
    write_encoder(package / "model")
    assert source.folder() == package / "model"
    assert source.identity(tmp_path / "digests")["kind"] == "package"
    assert describes_encoder(source.architecture())
    assert source.original() is source
    assert "carries_a_model" not in sys.modules
    missing = PackageModel("small", "no_such_package", "no-such-package", "model")
    with pytest.raises(ConfigError, match="python -m pip install no-such-package"):
        missing.folder()


def problems(tmp_path: Path, *overrides: str) -> list[str]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["suite=encoder", f"runs_dir={tmp_path}", *overrides])
    nodes = {key: composed[key] for key in composed if key not in ("job", "data")}
    config = OmegaConf.to_container(OmegaConf.create(nodes), resolve=True)
    found = tmp_path / "found"
    check.main({"configs": [config], "found": str(found)}, lambda text: None)
    return list(json.loads(found.read_text())["problems"])


@pytest.mark.parametrize("method", ["gptq", "nf4", "gguf", "hqq", "onnx_int4"])
def test_methods_of_causal_models_are_refused(method: str, tmp_path: Path) -> None:
    found = problems(tmp_path, "model=bert-base-uncased", f"method={method}")
    assert any(
        "takes causal language models, and bert-base-uncased is an encoder" in one for one in found
    )


@pytest.mark.parametrize("method", check.ENCODER_METHODS.replace("onnx_fp16, ", "").split(", "))
def test_the_named_methods_are_not(method: str, tmp_path: Path) -> None:
    found = problems(tmp_path, "model=bert-base-uncased", f"method={method}")
    assert not any("is an encoder" in one for one in found)
    assert problems(tmp_path, "model=embedded", "method=rtn") == []
