"""The documents' listings: found in three shapes, a changed document is refused, probes really run.

The documents are not part of the project; tests of them read the folder that QUANTBENCH_DOCUMENTS
names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import listings
from harness.listing_data import CODE, DATA, read_data
from harness.listing_run import Job, check_offline, run_job, without_places
from harness.listing_text import Listing, fenced, flattened, read_listings
from harness.listings import main, outcome, verdict
from kernels.errors import ConfigError

FENCED = "# Title\n```python\nimport os\n\nx = 1\n```\ntext\n```\na | b\n```\n"
FLATTENED = "说明:import osdef one(): return 1这段代码 class Two: pass```正文"
WORDS = [("import os", "return 1"), ("class Two:", "pass")]
FILES = {"A": {"file": "a.txt", "form": "fenced"}, "B": {"file": "b.txt", "form": "flattened"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(FENCED, encoding="utf-8")
    (tmp_path / "b.txt").write_text(FLATTENED, encoding="utf-8")
    return tmp_path


def entries() -> list[dict[str, Any]]:
    made = [
        {"id": f"A-{one.number}", "document": "A", "number": one.number, "digest": one.digest}
        for one in fenced(FENCED)
    ]
    for one, (first, last) in zip(flattened(FLATTENED, WORDS), WORDS, strict=True):
        about = {"id": f"B-{one.number}", "document": "B", "number": one.number}
        made.append({**about, "digest": one.digest, "first": first, "last": last})
    return made


def test_listings_are_found_between_fences_and_in_one_long_line(folder: Path) -> None:
    found = read_listings(folder, FILES, entries())
    assert found["A-1"] == Listing(1, "python", "import os\n\nx = 1")
    assert found["A-2"] == Listing(2, "", "a | b")
    assert found["B-1"] == Listing(1, "python", "import osdef one(): return 1")
    assert found["B-2"].text == "class Two: pass"
    assert [one.text for one in fenced("```bash\nls\n")] == ["ls"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda at: (at / "a.txt").write_text(FENCED.replace("x = 1", "x = 2")), "(A-1) has chang"),
        (
            lambda at: (at / "a.txt").write_text(FENCED + "```\nmore\n```\n"),
            "has 3 listings, and 2",
        ),
        (lambda at: (at / "b.txt").write_text("nothing"), "no listing from 'import os' to 'return"),
        (lambda at: (at / "b.txt").unlink(), "has no document b.txt"),
    ],
)
def test_another_document_is_refused(
    folder: Path, change: Callable[[Path], object], said: str
) -> None:
    change(folder)
    with pytest.raises(ConfigError) as raised:
        read_listings(folder, FILES, entries())
    assert said in str(raised.value)


def test_mistakes_on_the_command_line_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.yaml")
    assert main([str(tmp_path / "none"), "--out", out]) == 2
    assert main([str(tmp_path), "--out", out]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "there is no folder" in first
    assert "has no document 000_" in second


def test_an_unknown_id_and_interpreter_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listings, "read_listings", lambda *_: {})
    arguments = [str(tmp_path), "--out", str(tmp_path / "out.yaml")]
    assert main([*arguments, "--only", "000-99"]) == 2
    assert main([*arguments, "--python", str(tmp_path / "python")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("there is no listing of this id; ids are as 000-7, from 000-1 to 004-10")
    assert second.endswith("there is no such interpreter; make legacy-env")


def test_what_is_written_by_hand_is_whole() -> None:
    data = read_data()
    assert len({entry.id for entry in data.entries}) == len(data.entries) == 67
    for entry in data.entries:
        assert entry.document in data.files
        assert (entry.first is None) == (data.files[entry.document]["form"] == "fenced")
        assert entry.wants.endswith(".")
        assert entry.why.endswith(".")
        if entry.what in CODE:
            assert entry.instead, entry.id
        assert (entry.what == "commands") == (entry.not_run is not None)
    used = {name for entry in data.entries for one in entry.attempts for name in one.changes}
    assert used == set(data.changes)
    put = {name for entry in data.entries for one in entry.attempts for name in one.beside}
    assert put == set(data.beside)


def test_a_mistake_in_what_is_written_by_hand_is_named(tmp_path: Path) -> None:
    text = DATA.read_text(encoding="utf-8")
    for old, new, said in (
        ("what: diagram", "what: poem", "000-3 is one of code, commands"),
        ("probe: nanogpt_sizes", "probe: nothing_like_it", "000-7 names nothing_like_it"),
        ("digest: f3ef30d2d280", "digest: f\n    colour: red", "000-1 has unknown fields: colour"),
    ):
        path = tmp_path / "listings.yaml"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read_data(path)


def test_verdicts_follow_from_what_was_seen() -> None:
    by_id = {entry.id: entry for entry in read_data().entries}
    whole, failed = {"exit": 0}, {"exit": 1}

    def of(name: str, printed: Any, *attempts: dict[str, Any]) -> str:
        return verdict(by_id[name], {"as_printed": printed, "with_surroundings": [*attempts]})

    assert of("000-3", None) == "no code"
    assert of("000-9", None) == "not run"
    assert of("000-7", failed) == "does not run"
    assert of("000-7", failed, {**whole, "changes": []}) == "runs"
    assert of("000-7", failed, {**whole, "changes": ["one run"]}) == "runs changed"
    assert of("000-7", whole, {**failed, "changes": []}) == "does not run"
    assert of("000-7", failed, {**whole, "found": {"as_wanted": False}}) == "runs, wrong result"
    assert of("004-1", failed, {**whole, "changes": []}) == "runs changed"


def test_reasons_are_filled_with_facts_and_a_missing_one_is_named() -> None:
    entry = next(entry for entry in read_data().entries if entry.id == "003-3")
    seen: dict[str, Any] = {"as_printed": {"exit": 1}, "with_surroundings": []}
    with pytest.raises(ConfigError, match="why of 003-3 names 'code'"):
        outcome(entry, Listing(3, "python", "x"), seen)
    facts = {"code": 64, "restored": 0.5, "code_of_one": 128}
    seen["with_surroundings"] = [{"exit": 0, "changes": [], "found": facts}]
    assert "the code is 64" in outcome(entry, Listing(3, "python", "x"), seen)["why"]


def test_places_of_this_machine_are_left_out_and_addresses_kept(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    said = f"in {tmp_path}/scratch/a.py and {tmp_path}/venv/lib/b.py\n and /usr/lib/c.so; see "
    found = without_places(said + "https://a.org/b/c/d", tmp_path, python)
    assert found == "in ./a.py and <python>/lib/b.py and <path>; see https://a.org/b/c/d"
    assert len(without_places("x " * 500, tmp_path, python)) < 310


def offline() -> bool:
    try:
        check_offline()
    except ConfigError:
        return False
    return True


needs_namespaces = pytest.mark.skipif(not offline(), reason="no user namespaces here")
PYTHON = Path(sys.executable)


@needs_namespaces
def test_a_listing_runs_without_network_and_says_where_it_failed() -> None:
    text = "import socket\n\ntry:\n    socket.create_connection(('192.0.2.1', 80), 5)\nfinally:\n"
    found = run_job(Job(text + "    raise KeyError('no way out')"), PYTHON, 60)
    assert {name: found[name] for name in ("exit", "exception", "line", "quote")} == {
        "exit": 1,
        "exception": "KeyError",
        "line": 6,
        "quote": "raise KeyError('no way out')",
    }
    found = run_job(
        Job("import socket\nsocket.create_connection(('192.0.2.1', 80), 5)"), PYTHON, 60
    )
    assert (found["exception"], found["line"]) == ("OSError", 2)
    assert run_job(Job("x ="), PYTHON, 60)["exception"] == "SyntaxError"
    assert run_job(Job("raise SystemExit(3)"), PYTHON, 60)["exit"] == 3
    assert run_job(Job("print(1)"), PYTHON, 60)["exit"] == 0


@needs_namespaces
def test_an_endless_listing_and_a_greedy_one_are_ended() -> None:
    assert run_job(Job("while True: pass"), PYTHON, 1) == {
        "exit": None,
        "message": "ended after 1 s",
    }
    assert run_job(Job("x = bytearray(2**40)"), PYTHON, 60)["exception"] == "MemoryError"


@needs_namespaces
def test_what_is_beside_a_listing_is_there_and_the_probe_sees_its_names(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("answer = 42\n")
    said = "from model import answer\ndiff, output_fp32 = answer, __import__('math')\n"
    found = run_job(Job(said, "nanogpt_difference", {"model.py": tmp_path / "model"}), PYTHON, 60)
    # The probe was reached: `math` is no tensor.
    assert (found["exception"], found["exit"]) == ("AttributeError", 1)
    found = run_job(Job("", "worked_symmetric"), PYTHON, 60)
    assert found["found"]["codes"] == "[-84, -33, 0, 40, 127]"


def test_probes_of_the_article_say_what_their_listings_do() -> None:
    from harness.listing_probes import (
        article_adaptive,
        article_dynamic_static,
        article_int4,
        article_linear,
        article_next,
    )

    linear = article_linear.probe({})
    assert linear["asymmetric_error"] > 1 > 0.02 > linear["uint8_error"]
    assert linear["distinct_codes_10_to_11"] == 1
    assert article_dynamic_static.probe({})["raised"] != "nothing"
    adaptive = article_adaptive.probe({})
    assert adaptive["claimed_ratio"] >= 4 > adaptive["true_ratio"]
    int4 = article_int4.probe({})
    assert int4["pairs_survive"]
    assert int4["bits_a_weight"] == 4.75
    following = article_next.probe({})
    assert following["weights_gradient"] == 0
    assert following["intel_cpu_raised"] == "KeyError: 'tensor_core_support'"


@pytest.mark.skipif(
    "QUANTBENCH_DOCUMENTS" not in os.environ,
    reason="QUANTBENCH_DOCUMENTS names no folder with the documents",
)
def test_the_documents_are_those_that_the_data_were_written_for() -> None:
    data = read_data()
    found = read_listings(
        Path(os.environ["QUANTBENCH_DOCUMENTS"]), data.files, [vars(one) for one in data.entries]
    )
    assert len(found) == 67
    for entry in data.entries:
        if entry.first is None:
            text = "\n".join(found[name].text for name in (entry.id,))
            before = [name for one in entry.attempts for name in one.after]
            text += "\n".join(found[name].text for name in before)
            for one in entry.attempts:
                for name in one.changes:
                    assert data.changes[name].find in text, (entry.id, name)
