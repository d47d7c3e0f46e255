"""Where models come from: identities, folders, the hub's answers, and the published sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.load import meta_model, model_facts
from harness.models import (
    EmbeddedModel,
    HubModel,
    LocalModel,
    ModelSource,
    unquantized,
)
from harness.remembered import recall, remember
from harness.shape_model import ShapeModel
from kernels.errors import ConfigError
from tests.architectures import CONFIGS, write_checkpoint
from tests.harness.hub_server import CLOSED, COMMIT, Hub, ask, serve

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
# As published: model cards, papers, and the safetensors totals of the repositories.
PARAMETERS = {
    "gpt2": 124_439_808,
    "bert-base-uncased": 109_514_298,  # of 110,106,428 in the file, without pooler and second head
    "opt-125m": 125_239_296,
    "pythia-160m": 162_322_944,
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "shape": 551_339_520,
    "shape-1b": 1_100_048_384,
    "shape-llama-7b": 6_738_415_616,
}
WITHOUT_CONFIG = {"embedded", "local", "hub", "gguf", "minilm", "nanogpt"}


def source_of(choice: str) -> ModelSource:
    node = OmegaConf.create({"seed": 0, "model": OmegaConf.load(CONF / f"{choice}.yaml")})
    source: ModelSource = instantiate(node.model)
    return source


def test_every_choice_with_a_configuration_has_its_published_size_here() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} - WITHOUT_CONFIG == set(PARAMETERS)


@pytest.mark.parametrize("choice", PARAMETERS)
def test_the_kept_configuration_has_the_published_parameters(choice: str) -> None:
    source = source_of(choice)
    facts = model_facts(meta_model(source.architecture()))
    assert facts["parameters"] == PARAMETERS[choice]
    assert source.name == choice
    assert source.random_weights == choice.startswith("shape")
    assert facts["stored_dtype"] == source.architecture()["dtype"]


def test_the_embedded_model_lies_beside_the_code(tmp_path: Path) -> None:
    source = EmbeddedModel("embedded")
    assert source.architecture()["model_type"] == "llama"
    identity = source.identity(tmp_path / "digests.json")
    assert identity["kind"] == "embedded"
    assert len(identity["sha256"]) == 64


def test_a_local_model_is_known_by_its_content_not_by_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_checkpoint(first)
    write_checkpoint(second)
    digests = tmp_path / "digests.json"
    identity = LocalModel("a", str(first)).identity(digests)
    assert identity == LocalModel("b", str(second)).identity(digests)
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert identity != LocalModel("b", str(second)).identity(digests)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_one_changed_byte_is_another_model(file: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    source, digests = LocalModel("m", str(tmp_path)), tmp_path / "d" / "digests.json"
    before = source.identity(digests)
    content = bytearray((tmp_path / file).read_bytes())
    content[-3] ^= 1
    (tmp_path / file).write_bytes(content)
    assert source.identity(digests) != before


def test_digests_of_large_files_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + bytes(1 << 20))
    source, digests = LocalModel("m", str(tmp_path / "m")), tmp_path / "digests.json"
    before = source.identity(digests)
    known = recall(digests)
    assert list(known) == [str(weights)]
    # The remembered digest is really what is used: with another one the identity differs.
    remember(digests, {str(weights): [*known[str(weights)][:2], "other"]})
    assert source.identity(digests) != before
    os.utime(weights, ns=(1, 1))
    assert source.identity(digests) == before
    digests.write_text("{ torn")
    assert source.identity(digests) == before


@pytest.mark.parametrize("given", ["local", "mine"])
def test_a_local_model_is_called_after_its_folder_unless_named(given: str, tmp_path: Path) -> None:
    (tmp_path / "wiki6m").mkdir()
    expected = {"local": "wiki6m", "mine": "mine"}[given]
    assert LocalModel(given, str(tmp_path / "wiki6m") + "/").name == expected


def test_a_missing_folder_and_one_without_a_model_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path=.*nowhere: there is no folder"):
        LocalModel("m", str(tmp_path / "nowhere")).folder()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        LocalModel("m", str(tmp_path)).identity(tmp_path / "digests.json")
    (tmp_path / "config.json").write_text("{ torn")
    with pytest.raises(ConfigError, match=r"config\.json .* is not JSON"):
        LocalModel("m", str(tmp_path)).architecture()
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ConfigError, match="names no model_type"):
        LocalModel("m", str(tmp_path)).architecture()
    with pytest.raises(ConfigError, match=r"holds no weights: there is no model\.safetensors"):
        LocalModel("m", str(tmp_path)).identity(tmp_path / "digests.json")


def test_pickles_count_only_where_they_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"a pickle .* only with model\.allow_pickle=true"):
        LocalModel("m", str(tmp_path)).identity(tmp_path / "digests.json")
    allowed = LocalModel("m", str(tmp_path), allow_pickle=True)
    assert len(allowed.identity(tmp_path / "digests.json")["sha256"]) == 64


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 .* model-00002-of-00002\.safetensors"):
        LocalModel("m", str(tmp_path)).identity(tmp_path / "digests.json")
    index.write_text("[]")
    with pytest.raises(ConfigError, match="has no weight_map"):
        LocalModel("m", str(tmp_path)).identity(tmp_path / "digests.json")


def test_a_shape_is_its_configuration_and_seed(tmp_path: Path) -> None:
    config = CONFIGS["llama"]

    def identity(**changes: Any) -> dict[str, Any]:
        return ShapeModel(**{"name": "s", "config": config, **changes}).identity(tmp_path / "d")

    assert identity() == identity(name="other")
    assert identity() != identity(seed=1)
    assert identity() != identity(dtype="float16")
    assert identity() != identity(config={**config, "num_hidden_layers": 1})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert identity(config=str(tmp_path / "config.json")) == identity()
    write_checkpoint(tmp_path / "m")
    assert identity(tokenizer=str(tmp_path / "m")) != identity()


def test_a_shape_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype is 'int8'; it must be one of float32"):
        ShapeModel("s", CONFIGS["llama"], dtype="int8")
    with pytest.raises(ConfigError, match=r"model\.config .*nowhere\.json cannot be read"):
        ShapeModel("s", str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match="names no model_type"):
        ShapeModel("s", {"hidden_size": 4})
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        ShapeModel("s", CONFIGS["llama"], tokenizer=str(tmp_path)).tokenizer_folder()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


MODEL = "M.HubModel('m', 'owner/tiny')"
COMMIT_OF = f"{MODEL}.identity(Path('unused'))['commit']"


def test_a_hub_model_is_fetched_once_and_then_needs_no_network(
    checkpoint: dict[str, bytes], tmp_path: Path
) -> None:
    extra = {"pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"another format"}
    hub = Hub({"models/owner/tiny": {**checkpoint, **extra}})
    with serve(hub) as endpoint:
        assert ask(COMMIT_OF, tmp_path, endpoint) == COMMIT
        folder = Path(ask(f"{MODEL}.folder()", tmp_path, endpoint))
        fetched = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert fetched == checkpoint
        hub.requests.clear()
        assert ask(f"{MODEL}.folder()", tmp_path, endpoint) == str(folder)
        assert ask(COMMIT_OF, tmp_path, endpoint) == COMMIT
        assert hub.requests == []
    assert ask(f"{MODEL}.folder()", tmp_path, CLOSED, offline=True) == str(folder)
    assert ask(COMMIT_OF, tmp_path, CLOSED) == COMMIT
    (folder / "model.safetensors").unlink()
    sentence = ask(f"{MODEL}.folder()", tmp_path, CLOSED, offline=True)
    assert "HF_HUB_OFFLINE is set" in sentence


def test_pickles_of_the_hub_are_fetched_only_where_allowed(
    checkpoint: dict[str, bytes], tmp_path: Path
) -> None:
    pickled = {k: v for k, v in checkpoint.items() if not k.endswith(".safetensors")}
    hub = Hub({"models/owner/tiny": {**pickled, "pytorch_model.bin": b"a pickle"}})
    with serve(hub) as endpoint:
        sentence = ask(f"{MODEL}.folder()", tmp_path, endpoint)
        assert "model.allow_pickle=true" in sentence
        assert not any(path.endswith(".bin") for path in hub.requests)
        allowed = "M.HubModel('m', 'owner/tiny', allow_pickle=True).folder()"
        folder = Path(ask(allowed, tmp_path, endpoint))
        assert (folder / "pytorch_model.bin").read_bytes() == b"a pickle"


def test_what_the_hub_refuses_is_one_sentence_with_a_way_out(
    checkpoint: dict[str, bytes], tmp_path: Path
) -> None:
    name = "models/owner/tiny"
    with serve(Hub({name: checkpoint}, gated=frozenset({name}))) as endpoint:
        gated = ask(f"{MODEL}.folder()", tmp_path, endpoint)
        unknown = ask("M.HubModel('m', 'owner/none').folder()", tmp_path, endpoint)
        revision = ask("M.HubModel('m', 'owner/tiny', 'v9').identity(None)", tmp_path, endpoint)
    assert gated.startswith("error: model owner/tiny is gated: accept its terms at")
    assert "hf auth login" in gated
    assert "model=local model.path=FOLDER" in gated
    assert unknown.startswith("error: model owner/none is not on the Hugging Face hub")
    assert "model=local model.path=FOLDER" in unknown
    assert revision.startswith("error: model owner/tiny has no revision 'v9'")


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_reached_is_one_sentence(offline: bool, tmp_path: Path) -> None:
    reason = "HF_HUB_OFFLINE is set" if offline else "cannot be reached"
    for expression in (COMMIT_OF, f"{MODEL}.folder()", f"{MODEL}.architecture()"):
        sentence = ask(expression, tmp_path, CLOSED, offline)
        assert sentence.startswith("error: model owner/tiny is not (or not wholly) in the local")
        assert reason in sentence
        assert sentence.endswith("pass a folder with model=local model.path=FOLDER")
        assert "\n" not in sentence


def test_a_kept_configuration_needs_no_hub(tmp_path: Path) -> None:
    kept = "M.HubModel('m', 'owner/tiny', config={'model_type': 'llama'})"
    answer = ask(f"{kept}.architecture()", tmp_path, CLOSED, offline=True)
    assert answer == "{'model_type': 'llama'}"
    identity = ask(f"{kept}.architecture_identity()['kind']", tmp_path, CLOSED, offline=True)
    assert identity == "architecture"


def test_an_id_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.id has no value; give one: model\.id=OWNER"):
        HubModel("hub", None).folder()
    with pytest.raises(ConfigError, match="'a/b/c' cannot be the id of a model"):
        HubModel("hub", "a/b/c").folder()


def quantized_checkpoint(folder: Path, **changes: Any) -> Path:
    write_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": stated, **changes})
    )
    return folder


def test_a_quantized_checkpoint_has_an_original_only_where_one_is_named(tmp_path: Path) -> None:
    folder = quantized_checkpoint(tmp_path / "quantized")
    write_checkpoint(tmp_path / "float")
    alone = LocalModel("local", str(folder))
    assert alone.original() is None
    with pytest.raises(ConfigError, match=r"quantized is quantized already; .* method=checkpoint"):
        unquantized(alone)
    named = LocalModel("local", str(folder), reference=str(tmp_path / "float"))
    assert unquantized(named).folder() == tmp_path / "float"
    plain = LocalModel("local", str(tmp_path / "float"))
    assert unquantized(plain) is plain
    digests = tmp_path / "digests.json"
    identity = named.identity(digests)
    assert identity["reference"] == plain.identity(digests)
    assert {key: value for key, value in identity.items() if key != "reference"} == (
        alone.identity(digests)
    )


def test_the_old_file_of_a_quantized_checkpoint_counts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old")
    (tmp_path / "old" / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert LocalModel("local", str(tmp_path / "old")).original() is None


def test_a_reference_that_is_another_model_is_refused(tmp_path: Path) -> None:
    folder = quantized_checkpoint(tmp_path / "quantized", num_hidden_layers=3)
    write_checkpoint(tmp_path / "float")
    named = LocalModel("local", str(folder), reference=str(tmp_path / "float"))
    with pytest.raises(ConfigError, match="its num_hidden_layers is 2, the checkpoint's 3"):
        named.identity(tmp_path / "digests.json")
    nowhere = LocalModel("local", str(folder), reference="no such folder")
    with pytest.raises(ConfigError, match=r"no folder here and no id of the hub"):
        nowhere.original()
    hub = LocalModel("local", str(folder), reference="owner/name@v1").original()
    assert isinstance(hub, HubModel)
    assert (hub.id, hub.revision) == ("owner/name", "v1")
