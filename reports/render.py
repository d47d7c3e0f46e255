"""Writes a report: data files, figures, and the pages `report.md` and `report.html`.

All text from records is escaped, in Markdown as in HTML (`reports.layout`). A file is written to a
temporary name and renamed; equal records give equal bytes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.record import Record, read_records
from harness.temporary import temporary_beside
from reports import comparisons, contents, table, words
from reports.addresses import CELLS
from reports.cells import cell_files
from reports.documents.pages import audit_files
from reports.drawing import axes, pictures, plots
from reports.drawing.palette import Drawing
from reports.drawing.pictures import is_scene
from reports.engines import KL_TOLERANCES, PERPLEXITY_TOLERANCE
from reports.layout import html_page, markdown_page
from reports.page import MOST_DETAILED, Page, main_kernel, make_page

FOLDER = "report"
MOST_COMMANDS = 1000
"""Cells of a report above which it does not repeat the command of each."""

MOST_THREADS = 4
"""Drawings at once: each holds a large picture."""

FIGURE_PREFIXES = (
    *("perplexity-", "embedding-", "sensitivity-", "allocation-", "training-"),
    *("intervals-", "multiples-"),
)


SUMMARY_LEGEND = (
    "Size, memory and speed: ◆ best of the column, ◇ best after the baseline, where the baseline "
    "itself is best. Figures of quality are not ranked by their value: under each stands what its "
    "samples say of it against the baseline (see Verdicts). Below a figure: the row over the "
    "baseline (×), or the change of a perplexity in percent or of a task score in points. Speed "
    "is compared only where the baseline was timed in turns with the row in one process."
)
BEYOND_LEGEND = (
    f"With more than {MOST_DETAILED} rows, a group has this table of them alone. What others would "
    "show stands on the page of each cell, which its name leads to, in results.csv and in "
    "values.parquet; the tests stand in comparisons.csv."
)
REPEATS_LEGEND = (
    "A row of several repetitions shows means; ± is the 95 % t interval of the mean over them, s "
    "their standard deviation."
)
TASKS_LEGEND = (
    "± is one standard error. A score with a limit is a screening: it can show that a row is "
    "broken, not which of two good rows is better. Strict minus flexible, the stability of the "
    "format: right answers that were lost because they were not in the format asked for."
)
PARTS_LEGEND = (
    "Behind a score stands its difference from the baseline in points. Parts are not judged: few "
    "questions stand behind each, and of so many some differ by chance. The group's own score "
    "holds all their questions and carries the verdict."
)

ENGINES_LEGEND = (
    "Nothing was quantized in these rows: each engine runs the same weights. Behind a perplexity "
    "stands its difference from the first row's. A row differs where its perplexity is more than "
    f"{100 * PERPLEXITY_TOLERANCE:g} % away from that, or its mean KL (from the unquantized model, "
    "as everywhere) by more than "
    + ", ".join(f"{limit:g} nats in {dtype}" for dtype, limit in KL_TOLERANCES.items())
    + "; engines round activations in their own ways, so small differences remain."
)


class ReportError(ValueError):
    """There is nothing to report on; the message is one sentence for the user."""


@dataclass(frozen=True)
class ReportPaths:
    """Where the parts of a report are."""

    folder: Path
    html: Path
    markdown: Path
    results_csv: Path
    results_parquet: Path
    values_parquet: Path
    comparisons_csv: Path
    comparisons_parquet: Path
    figures: tuple[Path, ...]


def write_report(runs_dir: Path, repeat: str | None = None) -> ReportPaths:
    """Write the report of all records under `runs_dir` into `<runs_dir>/report/`.

    `repeat` says what makes repetitions (`seed`, `calibration`, `none`; None: as each record says).

    Raises:
        ReportError: the folder is missing or holds no record that can be read.
        OSError: a file could not be written; no half-written file is left.
    """
    with _uncollected():
        records, problems = read_runs(runs_dir)
        return write_pages(records, problems, runs_dir / FOLDER, repeat)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector of cycles still: a report makes millions of objects and few cycles.

    Looking for them took a tenth of the time of a report of 500 cells.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def read_runs(runs_dir: Path) -> tuple[list[Record], list[str]]:
    """Return the records under `runs_dir`, and the sentences of those that cannot be read.

    Raises:
        ReportError: the folder is missing or holds no record that can be read.
    """
    if not runs_dir.is_dir():
        raise ReportError(f"there is no folder {runs_dir}; give the runs_dir of a sweep")
    records, problems = read_records(runs_dir)
    if not records:
        damaged = f"; unreadable: {'; '.join(problems)}" if problems else ""
        raise ReportError(
            f"{runs_dir} holds no record (*/record.json) to report on{damaged}; "
            "run `python run.py -m` first, or give another folder"
        )
    # A report is made to be passed on: no paths of this machine.
    return records, [problem.replace(f"{runs_dir}/", "") for problem in problems]


def write_pages(
    records: Sequence[Record], problems: Sequence[str], folder: Path, repeat: str | None = None
) -> ReportPaths:
    """Write the report of `records` into `folder`, made if missing."""
    page = make_page(records, problems, repeat)
    drawn = drawings(page)
    figures = {f"{name}.png": drawing.png for name, drawing in drawn.items()}
    written = set()
    for name, content in _files(page, drawn):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / name, content)
        written.add(name)
    for old in (folder / CELLS).glob("*.html"):
        if f"{CELLS}/{old.name}" not in written:
            old.unlink(missing_ok=True)
    for old in folder.glob("*.png"):
        if old.name.startswith(FIGURE_PREFIXES) and old.name not in figures:
            old.unlink(missing_ok=True)
    return ReportPaths(
        folder=folder,
        html=folder / "report.html",
        markdown=folder / "report.md",
        results_csv=folder / "results.csv",
        results_parquet=folder / "results.parquet",
        values_parquet=folder / "values.parquet",
        comparisons_csv=folder / "comparisons.csv",
        comparisons_parquet=folder / "comparisons.parquet",
        figures=tuple(folder / name for name in figures),
    )


def _files(page: Page, drawn: Mapping[str, Drawing]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of every file, pages of cells first: they need the most room.

    What links to them is made before anything is written, and written when they are there.
    """
    main = {"report.md": markdown(page).encode(), "report.html": html(page, drawn).encode()}
    yield from cell_files(page)
    yield from audit_files(page).items()
    for name, drawing in drawn.items():
        yield f"{name}.png", drawing.png
    yield "results.csv", table.results_csv(page.rows)
    yield "results.parquet", table.results_parquet(page.rows)
    yield "values.parquet", table.values_parquet(page.rows)
    yield "comparisons.csv", comparisons.comparisons_csv(page.groups)
    yield "comparisons.parquet", comparisons.comparisons_parquet(page.groups)
    yield from main.items()


def _write(path: Path, content: bytes) -> None:
    """Write a file of a report, which a reader sees whole or as it was.

    A report can be made again, so its hundreds of pages do not wait for the disk as records do.
    """
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def drawings(page: Page) -> dict[str, Drawing]:
    """Return every figure and picture of `page` by its name, which stands in ids and files."""
    figures = [figure for section in page.sections for figure in section.figures]
    blocks = [*page.blocks, *(block for section in page.sections for block in section.blocks)]
    shown = [picture for block in blocks for picture in block.pictures]
    # Packing a PNG leaves other threads their turn; matplotlib's charts are for one thread alone.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        drawn = {one.name: pool.submit(plots.draw, one.plane, page.anchors) for one in figures}
        drawn |= {one.name: pool.submit(pictures.draw, one) for one in shown if is_scene(one)}
        charts = {one.name: pictures.draw(one) for one in shown if not is_scene(one)}
    return {**{name: future.result() for name, future in drawn.items()}, **charts}


def html(page: Page, drawn: Mapping[str, Drawing]) -> str:
    """Return the HTML page; `drawn` are its `drawings`."""
    svg = {name: drawing.svg for name, drawing in drawn.items()}
    return html_page("report.html.jinja", svg, **_context(page))


def markdown(page: Page) -> str:
    """Return the Markdown page, which shows the PNG files beside it."""
    return markdown_page("report.md.jinja", **_context(page))


def _context(page: Page) -> dict[str, Any]:
    return {
        "page": page,
        "main_kernel": main_kernel,
        "anchor": contents.anchor,
        "contents": contents.contents,
        "axis_of": axes.axis,
        "shown": axes.shown,
        "told": axes.told,
        "reading": words.READING,
        "engines_legend": ENGINES_LEGEND,
        "summary_legend": SUMMARY_LEGEND,
        "beyond_legend": BEYOND_LEGEND,
        "most_commands": MOST_COMMANDS,
        "repeats_legend": REPEATS_LEGEND,
        "tasks_legend": TASKS_LEGEND,
        "parts_legend": PARTS_LEGEND,
    }
