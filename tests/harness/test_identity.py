"""What makes two cells one, and what makes them two."""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from harness import identity
from kernels import compiler, host_build

MODEL = {"kind": "local", "digest": "abc"}
METHOD = {"_target_": "methods.unquantized.Unquantized", "name": "fp32", "dtype": "float32"}
CONFIG: dict[str, Any] = {
    "job": {"name": "cell", "child": None, "options": {}},
    "model": {"name": "m"},
    "method": {"_target_": "methods.rtn.RTN", "name": "rtn", "bits": 4, "group_size": 128},
    "baseline": METHOD,
    "seed": 0,
    "hardware": {"name": "cpu", "device": "cpu", "threads": 2, "time_limit_seconds": 60},
    "suite": {
        "name": "smoke",
        "measures": {
            "perplexity": {"_target_": "harness.measures.perplexity.Perplexity", "windows": 4}
        },
    },
    "reference_dtype": "float32",
}


def test_the_artefact_key_depends_on_all_that_makes_the_artefact() -> None:
    key = identity.artefact_key(MODEL, METHOD, None, 0)
    assert key == identity.artefact_key(dict(MODEL), dict(METHOD), None, 0)
    others = [
        identity.artefact_key({**MODEL, "digest": "abd"}, METHOD, None, 0),
        identity.artefact_key(MODEL, {**METHOD, "dtype": "float16"}, None, 0),
        identity.artefact_key(MODEL, METHOD, "calibration", 0),
        identity.artefact_key(MODEL, METHOD, None, 1),
    ]
    assert len({key, *others}) == 5


def test_a_new_library_version_is_a_new_artefact(monkeypatch: pytest.MonkeyPatch) -> None:
    key = identity.artefact_key(MODEL, METHOD, None, 0)
    monkeypatch.setattr(identity, "_version", lambda name: "9.9" if name == "torch" else None)
    assert identity.artefact_key(MODEL, METHOD, None, 0) != key


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        ("hardware.time_limit_seconds", 5, True),
        ("hardware.memory_limit_bytes", 10**9, True),
        ("hardware.threads", 1, False),
        ("suite.measures.perplexity.windows", 8, False),
        ("reference_dtype", "bfloat16", False),
    ],
)
def test_the_cell_key_depends_on_what_is_measured_and_where(
    path: str, value: Any, same: bool
) -> None:
    changed = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    node = changed
    for parent in parents:
        node = node[parent]
    node[last] = value
    before = identity.cell_key("a", "b", CONFIG, "text")
    assert (identity.cell_key("a", "b", changed, "text") == before) is same


def test_task_data_make_another_cell_and_none_make_the_same() -> None:
    plain = identity.cell_key("a", "b", CONFIG, "text")
    assert identity.cell_key("a", "b", CONFIG, "text", []) == plain
    keys = {identity.cell_key("a", "b", CONFIG, "text", [{"data": data}]) for data in "cd"}
    assert len(keys | {plain}) == 3


def test_artefact_baseline_and_text_make_other_cells() -> None:
    keys = {
        identity.cell_key(artefact, baseline, CONFIG, text)
        for artefact in "ab"
        for baseline in "ab"
        for text in "ab"
    }
    assert len(keys) == 8


def test_the_folder_of_a_cell_says_what_it_is_and_stays_in_place() -> None:
    key = "0123456789abcdef"
    assert identity.cell_id(CONFIG, key) == "m-rtn-4b-g128-cpu-smoke-0123456789ab"
    hostile = copy.deepcopy(CONFIG)
    hostile["model"]["name"] = "../../etc/<script>"
    hostile["method"]["group_size"] = -1
    folder = identity.cell_id(hostile, key)
    assert folder.endswith("-rtn-4b-perchannel-cpu-smoke-0123456789ab")
    assert "/" not in folder
    assert not folder.startswith(".")
    assert "<" not in folder


def test_code_counts_by_what_a_module_imports() -> None:
    rtn = identity.code_digest("methods.rtn.RTN")
    assert rtn == identity.code_digest("methods.rtn.RTN")
    assert rtn != identity.code_digest("methods.unquantized.Unquantized")
    names = {path.name for path in identity._imports(identity.ROOT / "methods" / "rtn.py")}
    assert {"affine.py", "base.py", "layers.py"} <= names


def test_sources_that_a_module_compiles_are_part_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(identity._COMPILED.values()) == {host_build.SOURCES, compiler.SOURCES}
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    (tmp_path / "kernels/c").mkdir(parents=True)
    module, source = tmp_path / "kernels/host_build.py", tmp_path / "kernels/c/packed.c"
    module.write_text("x = 1\n")
    monkeypatch.setattr(identity, "_COMPILED", {module: source.parent})
    digests = set()
    for text in ("int a;", "int b;"):
        source.write_text(text)
        digests.add(identity.code_digest("kernels.host_build"))
    assert len(digests) == 2


def test_the_reference_is_shared_by_all_methods_of_a_suite() -> None:
    other = copy.deepcopy(CONFIG)
    other["method"] = METHOD
    assert identity.reference_key("m", CONFIG, "t") == identity.reference_key("m", other, "t")
    assert identity.reference_key("m", CONFIG, "t") != identity.reference_key("n", CONFIG, "t")
    other["suite"]["measures"]["perplexity"]["windows"] = 8
    assert identity.reference_key("m", CONFIG, "t") != identity.reference_key("m", other, "t")


def test_a_module_counts_by_the_distribution_that_brings_it() -> None:
    assert identity._version("yaml") == metadata.version("PyYAML")
    assert identity._version("no_such_module") is None


def test_libraries_count_where_they_are_imported() -> None:
    own = identity.library_versions("methods.rtn")
    assert own["torch"] == metadata.version("torch")
    assert "lm_eval" not in own
    # Imported inside a function, and through another module of the project.
    assert "lm_eval" in identity.library_versions("harness.measures.tasks")
