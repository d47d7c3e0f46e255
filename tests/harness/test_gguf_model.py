"""A GGUF file as a model: here, on the hub, and beside its original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.gguf_model import GgufModel
from harness.models import LocalModel
from kernels.errors import ConfigError
from methods.gguf_read import read_config
from tests.architectures import tiny, tiny_tokenizer
from tests.harness.hub_server import CLOSED, COMMIT, Hub, ask, serve

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

TAKEN = "__import__('harness.gguf_model', fromlist=['']).GgufModel('gguf', {})"
ON_HUB = TAKEN.format("id='owner/tiny-GGUF', file='tiny.F16.gguf'")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from methods.gguf_export import export

    path = tmp_path_factory.mktemp("gguf") / "tiny.F16.gguf"
    export(tiny("llama_tied"), tiny_tokenizer(), path, "float16")
    return path


def test_a_file_is_named_identified_and_read_by_itself(file: Path, tmp_path: Path) -> None:
    model = GgufModel("gguf", str(file))
    assert model.name == "tiny.F16.gguf"
    assert model.folder() is None
    assert model.checkpoint() == file
    assert model.original() is None
    assert model.tokenizer_folder() is None
    assert model.architecture() == read_config(file)
    digests = tmp_path / "digests.json"
    identity = model.identity(digests)
    assert identity["kind"] == "gguf"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file_like = tmp_path / file.name
    file_like.write_bytes(bytes(changed))
    assert GgufModel("gguf", str(file_like)).identity(digests) != identity


def test_its_original_gives_the_tokenizer_and_must_be_of_its_shape(
    file: Path, tmp_path: Path
) -> None:
    for kind in ("llama_tied", "llama"):
        tiny(kind).to(torch.float16).save_pretrained(tmp_path / kind)
        tiny_tokenizer().save_pretrained(tmp_path / kind)
    model = GgufModel("gguf", str(file), reference=str(tmp_path / "llama_tied"))
    original = model.original()
    assert isinstance(original, LocalModel)
    assert model.tokenizer_folder() == original.folder()
    assert "reference" in model.identity(tmp_path / "digests.json")
    config = tmp_path / "llama" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 48'))
    other = GgufModel("gguf", str(file), reference=str(tmp_path / "llama"))
    with pytest.raises(ConfigError, match="is another model than the checkpoint: its hidden_size"):
        other.identity(tmp_path / "digests.json")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"id": "owner/name"},
        {"file": "a.gguf"},
        {"path": "a.gguf", "id": "owner/name", "file": "a.gguf"},
        {"path": "a.gguf", "file": "b.gguf"},
    ],
)
def test_it_is_one_file(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"model=gguf needs one file: model\.path=FILE\.gguf, or"):
        GgufModel("gguf", **given)


def test_what_is_no_file_or_no_gguf_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        GgufModel("gguf", str(tmp_path / "none.gguf")).checkpoint()
    (tmp_path / "text.gguf").write_text("not one, but long enough for a header")
    with pytest.raises(ConfigError, match="is no GGUF file that can be read"):
        GgufModel("gguf", str(tmp_path / "text.gguf")).architecture()


def test_one_file_of_the_hub_is_fetched_once_and_pinned(file: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes(), "tiny.Q4_0.gguf": b"another"}
    with serve(Hub({"models/owner/tiny-GGUF": files})) as endpoint:
        assert ask(f"{ON_HUB}.identity(None)['commit']", tmp_path, endpoint) == COMMIT
        path = Path(ask(f"{ON_HUB}.checkpoint()", tmp_path, endpoint))
        assert path.read_bytes() == file.read_bytes()
        assert {entry.name for entry in path.parent.iterdir()} == {file.name}
        missing = TAKEN.format("id='owner/tiny-GGUF', file='none.gguf'")
        sentence = ask(f"{missing}.checkpoint()", tmp_path, endpoint)
    assert sentence == "error: model owner/tiny-GGUF on the Hugging Face hub has no file none.gguf"
    assert ask(f"{ON_HUB}.checkpoint()", tmp_path, CLOSED, offline=True) == str(path)
