"""The pages in a browser: Chromium through playwright, offline, skipped where either is missing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from harness.record import Record
from reports.page import make_page
from reports.render import drawings, html, write_pages
from tests.reports.synthetic import Synthetic, with_tasks

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

SCRIPT_NAME = "<script>alert(1)</script>"
QUOTED_PATH = 'runs/it\'s "quoted" <b>'
METHODS = ("rtn", "gptq", "awq", "hqq", "nf4", "auto_round", "int8_static", "int8_dynamic", "w8a8")
LARGEST_PAGE = 4_000_000


@dataclass
class Opened:
    """A page, and what went wrong or was asked for while it was open."""

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def labels(self, section: str) -> list[str]:
        rows = self.page.locator(f'table[data-filter="{section}"] tbody tr:not([hidden]) .label')
        return [text.strip() for text in rows.all_text_contents()]

    def counted(self, section: str) -> str:
        return str(self.bar(section).locator("output").inner_text())

    def bar(self, section: str) -> Any:
        return self.page.locator(f'[id="{section}--filter"]')


def few() -> list[Record]:
    """Three cells of a model whose name is markup."""
    made = Synthetic(SCRIPT_NAME)
    cells = [
        made.cell("fp32", 32, None, "packed", "torch.linear"),
        made.cell("rtn", 8, 32, "packed", "rtn int8"),
        made.cell("gptq", 4, 128, "dequantized", f"kernel {QUOTED_PATH}"),
    ]
    return [
        replace(cell, cell=f"cell-{number}", config={**cell.config, "command": QUOTED_PATH})
        for number, cell in enumerate(cells)
    ]


def many() -> list[Record]:
    """Five hundred cells in four groups."""
    cells = []
    for model in ("m0", "m1", "m2", "m3"):
        made = Synthetic(model)
        cells.append(made.cell("fp32", 32, None, "packed", "torch.linear"))
        grid = itertools.product(METHODS, (8, 6, 4, 3, 2), (32, 64, 128))
        for method, bits, size in itertools.islice(grid, 124):
            cells.append(made.cell(method, bits, size, "packed", f"{method} kernel"))
    return [with_tasks(cell) for cell in cells]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(few(), [], tmp_path_factory.mktemp("few") / "report").folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main page alone: what else a report has, `small` has too."""
    folder = tmp_path_factory.mktemp("many")
    page = make_page(many())
    (folder / "report.html").write_text(html(page, drawings(page)))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, path: Path, address: str = "", **options: Any) -> Opened:
    context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
    context.set_offline(True)
    context.set_default_timeout(8000)
    found = Opened(context.new_page())
    context.on("request", lambda request: found.requests.append(request.url))
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.goto(path.as_uri() + address)
    return found


@pytest.fixture
def page(browser: Any, small: Path) -> Iterator[Opened]:
    found = opened(browser, small / "report.html")
    yield found
    assert found.said == []
    assert {url.partition("#")[0] for url in found.requests} == {(small / "report.html").as_uri()}
    found.page.context.close()


@pytest.fixture(scope="module")
def full(browser: Any, large: Path) -> Iterator[Opened]:
    found = opened(browser, large / "report.html")
    yield found
    assert found.said == []
    assert {url.partition("#")[0] for url in found.requests} == {(large / "report.html").as_uri()}
    found.page.context.close()


SMALL = "script-alert-1-script-on-cpu"


def test_heads_sort_and_say_so(page: Opened) -> None:
    head = page.page.locator(f'table[data-filter="{SMALL}"] th', has_text="Size on disk").first
    assert page.labels(SMALL) == ["fp32", "rtn 8 bits g32", "gptq 4 bits g128"]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.labels(SMALL) == ["gptq 4 bits g128", "rtn 8 bits g32", "fp32"]
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert page.labels(SMALL) == ["fp32", "rtn 8 bits g32", "gptq 4 bits g128"]


def test_words_filter_and_are_counted(page: Opened) -> None:
    search = page.bar(SMALL).get_by_label("Search")
    assert page.counted(SMALL) == "3 of 3 rows"
    search.fill("bits g1")
    assert page.labels(SMALL) == ["gptq 4 bits g128"]
    assert page.counted(SMALL) == "1 of 3 rows"
    search.fill("INT8 rtn")  # the kernel and the method, in any case and order
    assert page.labels(SMALL) == ["rtn 8 bits g32"]
    page.bar(SMALL).get_by_role("button", name="Reset").click()
    sync_api.expect(page.bar(SMALL).locator("output")).to_have_text("3 of 3 rows")


def test_a_point_shows_its_card_and_leads_to_its_row(page: Opened) -> None:
    page.page.get_by_label("gptq 4 bits g128: ").hover()
    card = page.page.locator(".card")
    text = " ".join(card.inner_text().split())
    row = page.page.locator("tr", has_text="gptq 4 bits g128").first
    assert text.startswith("gptq 4 bits g128 on the front Perplexity ")
    size = row.locator("td").nth(1).locator("b").inner_text()
    for said in (
        f"Size on disk {size} MB, ×0.3",
        "Bits 4",
        "Group size 128",
        "dequantized",
        QUOTED_PATH,
    ):
        assert said in text
    page.page.get_by_label("gptq 4 bits g128: ").click()
    assert page.page.evaluate("document.activeElement.id") == row.get_attribute("id")
    assert page.page.locator("tr:target").get_attribute("id") == row.get_attribute("id")
    assert row.is_visible()
    page.page.mouse.move(1, 1)
    assert card.is_hidden()


def test_the_keyboard_walks_the_chart(page: Opened) -> None:
    page.page.locator('.point[tabindex="0"]').focus()
    assert page.page.locator(".card strong").inner_text() == "gptq 4 bits g128"
    page.page.keyboard.press("ArrowRight")
    assert page.page.locator(".card strong").inner_text() == "rtn 8 bits g32"
    page.page.keyboard.press("End")
    assert page.page.locator(".card").inner_text().startswith("fp32")
    assert "baseline" in page.page.locator(".card").inner_text()
    page.page.keyboard.press("Escape")
    assert page.page.locator(".card").is_hidden()
    page.page.keyboard.press("Home")
    page.page.keyboard.press("Enter")
    assert page.page.locator("tr:focus .label").inner_text() == "gptq 4 bits g128"


def test_rows_light_up_their_points_and_methods_leave(page: Opened) -> None:
    halo = page.page.locator(".halo")
    assert halo.get_attribute("visibility") == "hidden"
    page.page.locator("tr .label", has_text="rtn 8").first.hover()
    assert halo.get_attribute("visibility") == "visible"
    page.page.get_by_role("button", name="rtn", exact=True).click()
    assert page.page.locator("a.point").count() == 2
    assert (
        page.page.get_by_role("button", name="rtn", exact=True).get_attribute("aria-pressed")
        == "false"
    )


def test_every_quality_is_drawn_against_every_cost(page: Opened) -> None:
    for quality in ("Perplexity", "KL, mean", "endings acc"):
        page.page.locator(".chart").get_by_label("Quality").select_option(label=quality)
        for cost in ("Size on disk", "Peak memory", "Decode"):
            page.page.locator(".chart").get_by_label("Cost").select_option(label=cost)
            name = page.page.locator(".stage svg").get_attribute("aria-label")
            assert name.startswith(f"{quality} against {cost.lower()}, ")
            assert page.page.locator("a.point").count() == 3


def test_names_that_are_markup_show_as_text(page: Opened) -> None:
    assert page.page.locator("h1").inner_text() == f"Quantization compared: {SCRIPT_NAME}"
    page.page.get_by_text("3 commands").click()
    assert page.page.locator("td code", has_text=QUOTED_PATH).count() == 3
    assert page.page.locator("script").count() == 1


@pytest.mark.parametrize(("scheme", "rules"), [("light", None), ("dark", ["color-contrast"])])
def test_no_serious_violation_of_accessibility(
    browser: Any, small: Path, scheme: str, rules: list[str] | None
) -> None:
    # In the dark only colours differ.
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = opened(browser, small / "report.html", color_scheme=scheme, bypass_csp=True)
    folded = "document.querySelectorAll('section:first-of-type details')"
    found.page.evaluate(f"for (const one of {folded}) one.open = true")
    found.page.locator("a.point").first.focus()
    options = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
    violations = axe.run(found.page, options=options).response["violations"]
    serious = [one for one in violations if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["target"] for node in one["nodes"][:3]]) for one in serious] == []
    found.page.context.close()


def test_without_script_tables_and_figures_stand_there(browser: Any, small: Path) -> None:
    found = opened(browser, small / "report.html", java_script_enabled=False)
    assert found.page.locator("table[data-filter] a.label").count() == 3
    assert found.page.locator("figure svg").first.is_visible()
    assert found.page.locator("form, .chart, th button").count() == 0
    found.page.context.close()


@pytest.mark.parametrize("name", ["report.html", "documents.html", "cells/cell-1.html"])
@pytest.mark.parametrize("width", [390, 1300])
def test_no_page_scrolls_sideways_or_asks_for_anything(
    browser: Any, small: Path, name: str, width: int
) -> None:
    found = opened(browser, small / name, viewport={"width": width, "height": 800})
    wide = found.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    assert found.said == []
    assert found.requests == [(small / name).as_uri()]
    found.page.context.close()


def test_five_hundred_cells_are_light(large: Path) -> None:
    assert (large / "report.html").stat().st_size < LARGEST_PAGE


def test_many_rows_sort_filter_and_keep_their_state(full: Opened) -> None:
    bar = full.bar("m1-on-cpu")
    assert full.counted("m1-on-cpu") == "125 of 125 rows"
    bar.locator("select[name=method]").select_option(label="gptq")
    assert full.counted("m1-on-cpu") == "15 of 125 rows"
    bar.locator("select[name=bits]").select_option(label="4")
    assert full.labels("m1-on-cpu") == ["gptq 4 bits g32", "gptq 4 bits g64", "gptq 4 bits g128"]
    bar.locator("select[name=group]").select_option(label="64")
    assert full.labels("m1-on-cpu") == ["gptq 4 bits g64"]
    chart = full.page.locator('[data-chart="m1-on-cpu"]')
    assert chart.locator("a.point").count() == 1
    assert chart.locator(".point.dim").count() == 124
    address = full.page.evaluate("location.hash")
    assert address == "#m1-on-cpu?method=%3Dgptq&bits=%3D4&group=%3D64"
    full.page.reload()
    assert full.labels("m1-on-cpu") == ["gptq 4 bits g64"]
    full.bar("m1-on-cpu").locator("[type=reset]").click()
    sync_api.expect(full.bar("m1-on-cpu").locator("output")).to_have_text("125 of 125 rows")
    assert full.page.evaluate("location.hash") == "#m1-on-cpu"


def test_limits_leave_the_rows_that_meet_them(full: Opened) -> None:
    bar = full.bar("m0-on-cpu")
    bar.locator("[data-metric=perplexity]").fill("6.5")
    bar.locator("[data-metric=artefact_bytes]").fill("4.9")
    left = full.labels("m0-on-cpu")
    assert 0 < len(left) < 60
    assert all(" 8 bits" not in label and " 2 bits" not in label for label in left)
    assert full.counted("m0-on-cpu") == f"{len(left)} of 125 rows"
    bar.locator("[data-metric=decode_tokens_per_second]").fill("1000000")
    assert full.counted("m0-on-cpu") == "0 of 125 rows"
    bar.locator("[type=reset]").click()
    sync_api.expect(bar.locator("output")).to_have_text("125 of 125 rows")


def test_a_click_far_away_scrolls_to_the_row(full: Opened) -> None:
    chart = full.page.locator('[data-chart="m2-on-cpu"]')
    point = chart.locator(".point.best").last
    point.focus()
    label = chart.locator(".card strong").inner_text()
    full.page.keyboard.press("Enter")
    row = full.page.locator("tr:target")
    assert row.locator(".label").inner_text() == label
    box = row.bounding_box()
    assert box is not None
    assert 0 < box["y"] < 900


def test_a_link_leads_to_its_heading_across_all_tables(full: Opened) -> None:
    full.page.evaluate("scrollTo(0, 0)")
    full.page.locator('nav a[href="#environment"]').first.click()
    full.page.wait_for_timeout(300)
    top = full.page.evaluate("document.getElementById('environment').getBoundingClientRect().top")
    assert 0 <= top < 120


def test_a_search_box_stands_above_the_other_tables(full: Opened) -> None:
    table = full.page.locator('[aria-label="Speed of m0 on cpu"] > table')
    bar = full.page.locator('[aria-label="Filter: Speed of m0 on cpu"]')
    bar.locator("[type=search]").fill("nf4 bits g64")
    assert bar.locator("output").inner_text() == "5 of 125 rows"
    assert table.locator("tbody tr:not([hidden])").count() == 5


def test_five_hundred_cells_fit_a_phone(full: Opened) -> None:
    full.page.set_viewport_size({"width": 390, "height": 800})
    assert full.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert (
        full.page.evaluate(
            "getComputedStyle(document.querySelector('tbody th:first-child')).position"
        )
        == "sticky"
    )
