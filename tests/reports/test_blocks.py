from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.record import Record
from reports.blocks import plain, share
from reports.gather import make_groups, make_rows
from reports.pareto import plane
from reports.render import write_report
from tests.reports.advanced import encoder, every_kind
from tests.reports.test_render import Outline, raw_html

Write = Callable[[list[Record]], Path]


def hostile(found: Any, name: str) -> Any:
    """Return `found` with every text but a few keywords replaced by `name`."""
    if isinstance(found, dict):
        return {key: hostile(value, name) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [hostile(value, name) for value in found]
    kept = ("bitmap", "dense", "qat", "rtn", "cell-a", "cell-b", "cell-c")
    return name if isinstance(found, str) and found not in kept else found


def test_a_page_with_everything_is_whole(runs: Write) -> None:
    paths = write_report(runs(every_kind()))
    page = Outline(paths.html.read_text())
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for wanted in (
        "Mixed bits",
        "Matrices by choice",
        "Training loss against steps",
        "Pruned, then quantized",
        "Distilled, then quantized",
        "Calibration compared",
        "Deployment of embedded on cpu: profile cpu_server",
        "Search over embedded on cpu",
        "Sensitivity of embedded on cpu",
        "What the documents claim",
        "contradicted by arithmetic",
        "python run.py job=sensitivity",
        "Same embeddings, cosine",
    ):
        assert wanted in page.text
    markdown = paths.markdown.read_text()
    images = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(images) == len(set(images)) == len(paths.figures)
    assert all((paths.folder / image).is_file() for image in images)
    assert {image.split("-")[0] for image in images} == {
        *("perplexity", "embedding", "allocation", "training", "sensitivity"),
        *("intervals", "multiples"),
    }
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_texts_of_jobs_and_methods_show_as_text(runs: Write) -> None:
    name = "<script>alert(1)</script>|`*"
    records = [
        replace(
            record,
            details={
                key: hostile(value, name)
                if key in ("method", "sensitivity", "deploy", "search", "calibration")
                else value
                for key, value in record.details.items()
            },
        )
        for record in every_kind()
    ]
    paths = write_report(runs(records))
    page = Outline(paths.html.read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(name) > 10
    assert not any("<script" in piece for piece in raw_html(paths.markdown.read_text()))


def test_pictures_of_an_older_report_are_removed(runs: Write) -> None:
    folder = runs(every_kind()[:2])
    stale = folder / "report" / "sensitivity-jobs.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    write_report(folder)
    assert not stale.exists()


def test_encoders_are_drawn_by_the_distance_of_their_embeddings() -> None:
    records = [
        encoder("fp32", 32, 9e7, 1.0),
        encoder("rtn", 4, 3e7, 0.96),
        encoder("int8_dynamic", 8, 4e7, 0.99),
    ]
    (group,) = make_groups(make_rows(records))
    found = plane(group, "artefact_bytes")
    assert found is not None
    assert found.quality == "embedding_distance"
    assert sorted(point.y for point in found.points) == pytest.approx([0.01, 0.04])
    assert found.left_out == ("fp32 (embedding distance 0.0)",)


def test_figures_of_fields_are_written_for_readers() -> None:
    assert plain(1234567.0).text == "1,234,567"
    assert plain(0.00012345).text == "0.000123"
    assert plain(None, "none").text == "none"
    assert plain(float("inf")).text == "infinite"
    assert share(0.1234).text == "12.3 %"
    assert share(float("nan")).text == "–"
