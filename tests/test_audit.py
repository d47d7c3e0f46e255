"""What `make audit` says, and what its configuration takes for granted."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tests import audit

SOURCES = [
    path
    for name in audit.CODE
    for path in (sorted((audit.ROOT / name).rglob("*.py")) or [audit.ROOT / name])
    # What the documents' listings do, and what runs in an environment of its own with older calls.
    if not {"listing_probes", "legacy"} & set(path.parts)
]


def calls(path: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """Return the last name and the keywords of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            found.append((name, {word.arg: word.value for word in node.keywords if word.arg}))
    return found


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def test_models_are_loaded_from_local_folders_and_only_the_hub_module_fetches() -> None:
    loads = [
        (path, given)
        for path in SOURCES
        for name, given in calls(path)
        if name == "from_pretrained"
    ]
    assert len(loads) > 8
    assert [str(path) for path, given in loads if not is_true(given.get("local_files_only"))] == []
    fetching = {"snapshot_download", "hf_hub_download", "load_dataset", "urlopen", "urlretrieve"}
    fetched = {path.name for path in SOURCES for name, _ in calls(path) if name in fetching}
    assert fetched == {"hub.py"}


def test_no_code_of_others_is_run_by_loading() -> None:
    for path in SOURCES:
        for name, given in calls(path):
            assert not is_true(given.get("trust_remote_code")), path
            assert not is_true(given.get("shell")), path
            if name == "load" and "map_location" in given:
                assert is_true(given.get("weights_only")), path


def test_every_exception_from_the_audit_names_its_rule_and_its_reason() -> None:
    lines = [
        line for path in SOURCES for line in path.read_text().splitlines() if "# nosec" in line
    ]
    assert len(lines) > 5
    for line in lines:
        assert re.search(r"# nosec B\d{3}\b", line), line


@pytest.mark.parametrize(
    ("libraries", "status", "said"),
    [
        (
            [{"name": "a", "skip_reason": "not found"}],
            0,
            "skipped, no vulnerability service answers",
        ),
        ([{"name": "a", "version": "1", "vulns": []}], 0, "0 of 1 pinned libraries have known"),
        (
            [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}],
            1,
            "a 1: CVE-1, fixed in 2",
        ),
        (
            [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}],
            0,
            "not looked up, since the index does not know them: b",
        ),
    ],
)
def test_what_is_known_of_libraries_is_told(
    libraries: list[dict[str, Any]], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.tell(libraries) == status
    assert said in capsys.readouterr().out


def test_an_unreachable_service_is_skipped_visibly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*arguments: str) -> Any:
        raise ValueError("a traceback\nConnectionError: no route")

    monkeypatch.setattr(audit, "_answer", unreachable)
    assert audit.audit_libraries() == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "pip-audit: skipped" in out
