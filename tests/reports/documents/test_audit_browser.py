"""The page of the documents in a browser: one choice of a verdict for all tables, offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reports.documents.pages import audit_files
from reports.page import Page, make_page
from tests.reports.synthetic import Synthetic

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

VISIBLE = "rows => rows.filter(row => row.offsetParent !== null).map(row => row.id)"


@pytest.fixture(scope="module")
def page() -> Page:
    return make_page(Synthetic().grid()[:3])


@pytest.fixture(scope="module")
def file(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "documents.html"
    path.write_bytes(audit_files(page)["documents.html"])
    return path


def test_a_verdict_is_chosen_for_all_tables(page: Page, file: Path) -> None:
    wanted = "contradicted by arithmetic"
    chosen = [one.fact.id for one in page.audit.facts if one.verdict == wanted]
    other = next(one.fact.id for one in page.audit.facts if one.verdict != wanted)
    said: list[str] = []
    requests: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 390, "height": 900})
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto(file.as_uri())
        rows = opened.locator("tr[data-verdict]")
        assert rows.evaluate_all(VISIBLE) == [one.fact.id for one in page.audit.facts]
        opened.select_option("#verdict", wanted)
        assert rows.evaluate_all(VISIBLE) == chosen
        assert opened.inner_text("#verdict-count") == f"{len(chosen)} shown"
        tables = opened.locator("table.cells").evaluate_all("all => all.map(t => t.offsetParent)")
        assert tables.count(None) == sum(
            not any(one.verdict == wanted for one in table.facts) for table in page.audit.tables
        )
        # A link to a row that is left out shows it again.
        opened.evaluate(f"location.hash = '{other}'")
        opened.wait_for_function(f"document.getElementById('{other}').offsetParent !== null")
        width = opened.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert width == 390
    assert said == []
    assert requests == [file.as_uri()]
