from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from harness.record import FILE_NAME, Record
from reports.__main__ import main
from reports.addresses import CELLS
from reports.drawing import palette, plots
from reports.render import ReportError, write_pages, write_report
from tests.reports.synthetic import environment

Write = Callable[[list[Record]], Path]
VOID = {"meta", "wbr", "br", "path", "use", "rect"}


FOLDED = (
    *("By which rules", "Row by row", "Tasks", "Tasks by part", "Quality", "Speed"),
    "Size, memory and preparation",
    *("Kernels", "Coverage", "Generated texts", "Cards", "Table by table"),
)


def raw_html(markdown: str) -> list[str]:
    """Return every piece of Markdown that a renderer passes on as HTML."""
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown):
        for piece in (token, *(token.children or ())):
            if piece.type in ("html_block", "html_inline"):
                found.append(piece.content.strip())
    return found


class Outline(HTMLParser):
    """Collects tags, attributes and text, and holds that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_everything_is_written_beside_each_other(runs: Write, sweep: list[Record]) -> None:
    paths = write_report(runs(sweep))
    names = {path.name for path in paths.folder.iterdir()}
    assert names >= {
        *("report.html", "report.md", "results.csv", "results.parquet", "values.parquet"),
        *("comparisons.csv", "comparisons.parquet"),
        "perplexity-artefact-embedded-on-cpu.png",
        "perplexity-decode-embedded-on-cpu.png",
    }
    assert paths.html.is_file()
    assert set(paths.figures) == set(paths.folder.glob("*.png"))
    assert len(list((paths.folder / CELLS).iterdir())) == len(sweep)


def test_the_page_is_well_formed_and_asks_for_nothing(runs: Write, sweep: list[Record]) -> None:
    folder = write_report(runs(sweep)).folder
    page = Outline((folder / "report.html").read_text())
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            if target is not None and target.startswith("#"):
                assert target[1:] in ids
            elif target is not None:
                assert (folder / target.partition("#")[0]).is_file()
    text = write_report(runs(sweep)).html.read_text()
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(http" not in text


def test_the_page_tells_what_the_brief_asks(runs: Write, sweep: list[Record]) -> None:
    text = Outline(write_report(runs(sweep)).html.read_text()).text
    for wanted in (
        "embedded demonstration model",
        "say nothing of real language models",
        "The weights of shape-0.5b are random",
        "What this shows",
        "Smallest within 1 % of the baseline's perplexity",
        "best of the column",
        "screening: first 100 questions",
        "it needed more memory than its limit of 64 MiB",
        "infinite",
        "Not drawn: rtn 2 bits g128 (perplexity infinite)",
        "noisy: spread 17.0 %",
        "not measured",
        "Synthetic CPU",
        "python run.py model=embedded method=rtn bits=4 group_size=128 hardware=cpu",
        "How to read this",
        "GPTQ protocol: the rows of embedded",
        "quantized::linear_dynamic",
        "model.layers.*.input_layernorm.weight",
    ):
        assert wanted in text


def test_random_weights_show_no_quality_and_no_text(runs: Write, sweep: list[Record]) -> None:
    random = [record for record in sweep if record.config["model"] == "shape-0.5b"]
    text = Outline(write_report(runs(random)).html.read_text()).text
    assert "Generated texts" not in text
    assert "embedded_gptq" not in text
    assert "the weights are random, so quality would mean nothing" in text


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "</title><img src=x onerror=alert(1)>", "a|b`c*_$x$"]
)
def test_names_show_as_text(runs: Write, grid: list[Record], name: str) -> None:
    def renamed(record: Record, label: str) -> Record:
        config = {**record.config, "model": name, "command": label, "suite": label, "data": label}
        details = {
            **record.details,
            "notes": [label],
            "kernels": [{**record.details["kernels"][0], "kernel": label, "layer": label}],
            "generation": [{"prompt": label, "reference": label, "text": f"{label}!"}],
        }
        return replace(record, config=config, details=details, environment=environment(cpu=label))

    paths = write_report(runs([renamed(record, name) for record in grid]))
    page = Outline(paths.html.read_text())
    assert page.text.count(name) > 10
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "title")].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert set(raw_html(paths.markdown.read_text())) <= {
        *("<br>", "<ins>", "</ins>", "</details>"),
        *(f"<details><summary>{title}</summary>" for title in FOLDED),
    }


def test_markdown_tables_have_as_many_fields_as_heads(runs: Write, sweep: list[Record]) -> None:
    paths = write_report(runs(sweep))
    markdown = paths.markdown.read_text()
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(blocks) > 8
    for block in blocks:
        fields = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(fields) == 1
    for image in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (paths.folder / image).is_file()


def test_equal_records_give_equal_files(runs: Write, sweep: list[Record]) -> None:
    folder = runs(sweep)

    def written() -> dict[Path, bytes]:
        files = (path for path in write_report(folder).folder.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files}

    assert written() == written()


def test_damaged_records_are_named_and_not_fatal(runs: Write, grid: list[Record]) -> None:
    folder = runs(grid)
    damaged = folder / "cell003" / FILE_NAME
    damaged.write_bytes(damaged.read_bytes().replace(b"embedded", b"imbedded", 1))
    (folder / "empty").mkdir()
    (folder / "torn").mkdir()
    (folder / "torn" / FILE_NAME).write_text('{"digest"')
    paths = write_report(folder)
    text = Outline(paths.html.read_text()).text
    assert "cell003/record.json is damaged: its digest does not match its content" in text
    assert "torn/record.json is not a record" in text
    assert "14 (12 ok, 2 unreadable)" in text
    assert str(folder) not in paths.html.read_text()
    assert str(folder) not in paths.markdown.read_text()


def test_rows_of_several_machines_are_pointed_out(runs: Write, grid: list[Record]) -> None:
    other = replace(grid[0], environment=environment(cpu="Another CPU"))
    text = Outline(write_report(runs([other, *grid[1:]])).html.read_text()).text
    assert "Rows come from different machines" in text
    assert "Another CPU" in text


def test_figures_of_an_older_report_are_removed(runs: Write, grid: list[Record]) -> None:
    folder = runs(grid)
    stale = folder / "report" / "perplexity-artefact-gone-on-cpu.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    kept = folder / "report" / "my-own-picture.png"
    kept.write_bytes(b"mine")
    write_report(folder)
    assert not stale.exists()
    assert kept.exists()


def test_a_failure_while_drawing_leaves_the_old_report(
    runs: Write, grid: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs(grid)
    before = write_report(folder).html.read_bytes()

    def fail(*_: object) -> palette.Drawing:
        raise OSError("no space left on device")

    monkeypatch.setattr(plots, "draw", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(folder)
    assert (folder / "report" / "report.html").read_bytes() == before
    assert not list((folder / "report").glob("*.tmp"))


def test_records_without_figures_still_make_a_report(tmp_path: Path) -> None:
    bare = Record(cell="c", status="ok", config={})
    failed = Record(cell="d", status="failed", config={"model": "m"})
    paths = write_pages([bare, failed], [], tmp_path / "report")
    text = Outline(paths.html.read_text()).text
    assert "No record states its environment" in text
    assert "The record gives no reason" in text
    assert paths.figures == ()


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_report_on_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    folder = tmp_path / "runs"
    if exists:
        folder.mkdir()
    assert main([str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert str(folder) in said.err
    assert said.err.count("\n") == 1
    assert not (folder / "report").exists()


def test_only_damaged_records_are_an_error_that_names_them(tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    cell.mkdir()
    (cell / FILE_NAME).write_text("{}")
    with pytest.raises(ReportError, match=r"unreadable: .*cell/record\.json is not a record"):
        write_report(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(
    runs: Write, grid: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs(grid[:2])
    (folder / "report").write_text("in the way")
    assert main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_line_writes_the_report_without_torch(runs: Write, grid: list[Record]) -> None:
    folder = runs(grid[:3])
    code = (
        "import sys; from reports.__main__ import main; status = main([sys.argv[1]]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"report: {folder / 'report' / 'report.html'}\n"
    assert done.stderr == ""
