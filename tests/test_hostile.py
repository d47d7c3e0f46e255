"""Names and files from elsewhere: nothing outside their folder is read or written, nothing runs."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness import folders, identity, plan
from harness.artefacts import MANIFEST, ArtefactError, read_manifest, verify
from harness.cache import Cache
from harness.load import load_tokenizer
from harness.record import FILE_NAME, Record, RecordError, digest, read_record, write_record
from kernels.errors import ConfigError
from methods import artefact, gptq_format
from methods.patterns import unsafe
from reports.__main__ import main as reports
from reports.addresses import cell_page
from tests.fuzz.guard import watched
from tests.fuzz.records import example
from tests.harness.test_artefacts import make

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "methods", "kernels", "reports", "hydra_plugins")
OUTSIDE = ("../../secret", "/etc/passwd", "..", "a/../../secret", "a\0b", "", "a\\..\\b")


def sources() -> Iterator[Path]:
    yield ROOT / "run.py"
    for package in PACKAGES:
        # What the documents' listings do is run to show what becomes of it.
        found = sorted((ROOT / package).rglob("*.py"))
        yield from (path for path in found if "listing_probes" not in path.parts)


def called(path: Path) -> Iterator[str]:
    """Yield the dotted name of every call in a file, as far as it is made of names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            parts, owner = [], node.func
            while isinstance(owner, ast.Attribute):
                parts.append(owner.attr)
                owner = owner.value
            if isinstance(owner, ast.Name):
                yield ".".join([owner.id, *parts[::-1]])


NEVER = (
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "dill.load"),
    *("joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open"),
    *("numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle", "shutil.unpack_archive"),
)


def test_nothing_that_runs_what_it_reads_is_called_anywhere() -> None:
    made = [(path.name, name) for path in sources() for name in called(path)]
    assert len(made) > 5000
    # What a model wrote for a task is compiled and run in a sandbox that is made for it.
    assert {call for call in made if call[1] in NEVER} == {
        ("sandbox_child.py", "compile"),
        ("sandbox_child.py", "exec"),
    }
    # With weights_only, as tests/test_audit.py holds.
    assert {place for place, name in made if name == "torch.load"} == {"nanogpt_convert.py"}


def sealed(folder: Path, change: Callable[[dict[str, Any]], object], part: str, name: str) -> None:
    """Change a document's payload on disk and put the right digest beside it."""
    document = json.loads((folder / name).read_text())
    change(document[part])
    document["digest"] = digest(document[part])
    (folder / name).write_text(json.dumps(document))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_artefact_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("s")
    folder = make(tmp_path / "runs")
    facts = {"bytes": 1, "sha256": "0"}
    sealed(folder, lambda m: m["files"].update({name: facts}), "manifest", MANIFEST)
    with watched(folder.resolve()), pytest.raises(ArtefactError, match="as 'files'"):
        verify(folder)


def test_a_file_of_an_artefact_that_is_a_link_to_outside_is_not_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "runs")
    path = folder / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with watched(folder.resolve()), pytest.raises(ArtefactError, match="a link to outside"):
        verify(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_plan_names_cells_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    plan.write_plan(tmp_path, ["a", name], [])
    with pytest.raises(plan.PlanError, match="as 'cells'"):
        plan.read_plan(tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_record_is_of_a_cell_that_is_a_folder_of_the_run(tmp_path: Path, name: str) -> None:
    write_record(replace(example(), cell=name), tmp_path)
    with pytest.raises(RecordError, match="as 'cell'"):
        read_record(tmp_path)
    address = cell_page(name)
    assert re.fullmatch(r"cells/[\w.-]+\.html", address)
    assert "/.." not in address


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_weight_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / folders.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with watched(folder.resolve()), pytest.raises(ConfigError, match="a file beside it"):
        folders.folder_digest(folder, False, folder / "digests.json")


@pytest.mark.parametrize("name", [*OUTSIDE, "x" * 400, "日" * 200, "<script>", ".hidden"])
@pytest.mark.parametrize("place", ["model", "method", "hardware", "suite", "job"])
def test_a_name_of_the_configuration_makes_a_folder_of_the_run(place: str, name: str) -> None:
    nodes = ("model", "method", "hardware", "suite")
    config: dict[str, Any] = {node: {"name": "n"} for node in nodes}
    config["job"] = {"name": "cell"}
    config[place]["name"] = name
    key = "0123456789abcdef"
    found = identity.cell_id(config, key)
    assert re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,179}", found)
    assert found.endswith(key[: identity.KEY_LENGTH])
    assert ".." not in Path(found).parts


@pytest.mark.parametrize("key", ["../../x", "/etc/passwd", {"a": "../b"}])
def test_the_key_of_a_cache_entry_is_digested(tmp_path: Path, key: Any) -> None:
    path = Cache(tmp_path).path("tokens", key)
    assert path.parent == tmp_path / "tokens"
    assert re.fullmatch(r"[0-9a-f]{32}\.safetensors", path.name)


RECORD_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a value of text": lambda r: r["values"][0].update(value="5.5"),
    "a value that is true": lambda r: r["values"][0].update(value=True),
    "a value without end": lambda r: r["values"][0].update(value=10**400),
    "a metric of lists": lambda r: r["values"][0].update(metric=["a"]),
    "samples of texts": lambda r: r["values"][0].update(samples=["1"]),
    "samples of lists": lambda r: r["values"][0].update(samples=[[1.0]]),
    "samples as an object": lambda r: r["values"][0].update(samples={"a": 1}),
    "a field too many": lambda r: r["values"][0].update(more=1),
    "values that are texts": lambda r: r.update(values=["a"]),
    "values as an object": lambda r: r.update(values={"a": {}}),
    "an error of numbers": lambda r: r["errors"][0].update(message=3),
    "another status": lambda r: r.update(status="fine"),
    "a configuration that is a list": lambda r: r.update(config=[]),
    "seconds of text": lambda r: r.update(seconds="1"),
    "details nested without end": lambda r: r["details"].update(a=nested(60)),
}


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("what", sorted(RECORD_CHANGES))
def test_a_record_of_the_wrong_types_is_refused_whatever_its_digest(
    tmp_path: Path, what: str
) -> None:
    write_record(example(), tmp_path)
    assert read_record(tmp_path) == example()
    sealed(tmp_path, RECORD_CHANGES[what], "record", FILE_NAME)
    with pytest.raises(RecordError) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content",
    [b'{"record": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"record": {"a": "\\ud800"}}'],
)
def test_what_pythons_parser_stumbles_over_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(RecordError, match="is not a record"):
        read_record(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtefactError, match="no readable manifest"):
        read_manifest(tmp_path)


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(RecordError, match="no regular file"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "(.*a){20}",
        "((a*)*)*",
        "(?:x|y|x)+z",
        ".*.*.*.*.*x",
        "(((",
        "[a",
        "a" * 2000,
    ],
)
def test_patterns_that_may_never_end_are_refused(tmp_path: Path, pattern: str) -> None:
    assert unsafe(pattern) is not None
    stated = {"quant_method": "awq", "bits": 4, "group_size": 128}
    for given in ([pattern], {f"-:{pattern}": {}}, pattern):
        (tmp_path / "config.json").write_text(
            json.dumps({"quantization_config": {**stated, "modules_to_not_convert": given}})
        )
        with pytest.raises(ConfigError, match="has the expression"):
            gptq_format.scheme_of(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        *("lm_head", "lm_head$", "model.layers.0.mlp.down_proj", r".*self_attn.(q|k|v)_proj$"),
        *(r".*\.(?:18|19)\..*(?:gate|up|down).*", r"model\.layers\.\d+\.mlp\.gate$", "visual.*"),
    ],
)
def test_patterns_of_real_checkpoints_are_taken(pattern: str) -> None:
    assert unsafe(pattern) is None


@pytest.mark.parametrize("name", ["forward", "__class__", "lm_head.forward", "training", "", "x.y"])
def test_an_artefact_replaces_matrices_and_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 2)})
    monkeypatch.setattr(artefact, "skeleton", lambda folder: model)
    document = {"format": artefact.FORMAT, "layers": {name: {}}, "tied": {}}
    (tmp_path / artefact.LAYERS).write_text(json.dumps(document))
    save_file({"a": torch.zeros(1)}, tmp_path / artefact.WEIGHTS)
    with pytest.raises(ConfigError, match="a layer that its model lacks"):
        artefact.load(tmp_path, lambda name, facts: torch.nn.Identity(), torch.float32)


EVIL = "<script>alert(1)</script>\"'&{{7*7}}|`*_[x](javascript:alert(1))\x1b[31m\r\nred\x07\u202e"


def evil(found: Any) -> Any:
    """Return `found` with the hostile text in the place of every text, and behind every key."""
    if isinstance(found, dict):
        return {key: evil(value) for key, value in found.items()}
    if isinstance(found, list):
        return [evil(value) for value in found]
    return EVIL if isinstance(found, str) else found


def evil_records(folder: Path) -> None:
    """Write three records whose every text is hostile; axes stay apart, so there are rows."""
    for number, status in enumerate(("ok", "partial", "failed")):
        payload = asdict(example())
        hostile = evil(json.loads(json.dumps(payload)))
        hostile |= {"cell": f"cell{number}", "status": status}
        hostile["config"] |= {"bits": 4 + number, "group_size": 32, "baseline": EVIL}
        hostile["details"] |= {"generation": [{"prompt": EVIL, "reference": EVIL, "text": EVIL}]}
        (folder / f"cell{number}").mkdir(parents=True)
        document = {"digest": digest(hostile), "record": hostile}
        (folder / f"cell{number}" / FILE_NAME).write_text(json.dumps(document))


def test_a_report_of_hostile_texts_shows_them_and_runs_none(tmp_path: Path) -> None:
    from reports.render import write_report
    from reports.table import summary_text
    from tests.reports.test_render import Outline, raw_html

    runs = tmp_path / "runs"
    evil_records(runs)
    paths = write_report(runs)
    pages = [paths.html, *sorted(paths.folder.glob("cells/*.html"))]
    assert len(pages) == 4
    for path in pages:
        text = path.read_text(encoding="utf-8")
        page = Outline(text)
        scripts = [tag for tag, _ in page.tags if tag == "script"]
        assert len(scripts) == (1 if path == paths.html else 0)
        for _, attributes in page.tags:
            assert not any(name.startswith("on") for name in attributes)
            assert "javascript:" not in (attributes.get("href") or "")
        assert "{{7*7}}" in page.text
        assert "alert(1)</script>" in page.text
        assert not set(text) & set("\x1b\x07")
    markdown = paths.markdown.read_text(encoding="utf-8")
    assert not any("script" in found or "alert" in found for found in raw_html(markdown))
    assert not set(markdown) & set("\x1b\x07")
    said = summary_text([read_record(runs / f"cell{number}") for number in range(3)], width=120)
    assert all(line.isprintable() for line in said.splitlines())


def test_the_command_prints_no_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil_records(tmp_path / "runs")
    (tmp_path / "runs" / "cell1" / FILE_NAME).write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    for arguments in (["runs"], ["runs", "--compare", EVIL, "b"], ["recommend", "runs"]):
        reports(arguments)
        said = "".join(capsys.readouterr())
        assert said
        assert not set(said) & set("\x1b\x07\r")


def test_secrets_beside_a_tokenizer_are_not_read_through_its_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    source = ROOT / "harness" / "embedded" / "model"
    folder.mkdir()
    for path in source.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text((source / "config.json").read_text())
    secret = tmp_path / "secret.json"
    secret.write_text((folder / "tokenizer.json").read_text())
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    files = ("vocab_file", "tokenizer_file", "merges_file", "special_tokens_map_file")
    path.write_text(json.dumps({**known, **dict.fromkeys(files, str(secret))}))
    # Paths of whoever saved it stand in real ones: they are no error, and no file is opened there.
    with watched(folder.resolve()):
        assert load_tokenizer(folder) is not None


def test_a_record_of_no_values_is_read(tmp_path: Path) -> None:
    write_record(Record("cell", "failed", {}), tmp_path)
    assert read_record(tmp_path) == Record("cell", "failed", {})
