"""Lays out pages: templates filled, all text escaped, in HTML and in Markdown.

An HTML page is self-contained: its style, its scripts and its figures are in it, and its own policy
forbids every request (`templates/layout.html.jinja`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import pareto, words
from reports.addresses import cell_page

TEMPLATES = Path(__file__).with_name("templates")
"""By path: a folder `reports` where the program is called does not stand in its way."""

_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?")
"""What a text may begin with; `figureOf` of `templates/tables.js` reads the same."""

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tabs and line ends, and those that change the direction of text."""

UNBROKEN = 20
"""Letters of a word that stand on one line in a head or a label."""


def html_page(template: str, svg: Mapping[str, str], **context: Any) -> str:
    """Return `template` filled with `context`; `svg` are its figures by name, trusted as markup."""
    return _printable(
        _html_environment()
        .get_template(template)
        .render(
            **context,
            style=_trusted("style.css"),
            script=_trusted("tables.js"),
            svg={name: Markup(drawing) for name, drawing in svg.items()},  # nosec B704  # our own
        )
    )


def markdown_page(template: str, **context: Any) -> str:
    """Return `template` filled with `context`, every text escaped."""
    text = _markdown_environment().get_template(template).render(**context)
    return re.sub(r"\n{3,}", "\n\n", _printable(text)).strip() + "\n"


def _printable(page: str) -> str:
    """Return `page` without what acts on a terminal that shows it, or turns its words around."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", page)


@cache
def _html_environment() -> Environment:
    environment = _environment(autoescape=True)
    environment.filters["breakable"] = _breakable
    environment.filters["sortable"] = _sortable
    environment.filters["cell_page"] = cell_page
    return environment


@cache
def _markdown_environment() -> Environment:
    environment = _environment(finalize=_escape_markdown)
    environment.filters["code"] = _code
    environment.filters["fenced"] = _fenced
    environment.filters["raw"] = Markup
    return environment


@cache
def _trusted(name: str) -> Markup:
    """Return a style sheet or a script of the project's own, read once for all pages."""
    return Markup((TEMPLATES / name).read_text())  # nosec B704  # a file of the project


def _environment(**options: Any) -> Environment:
    environment = Environment(  # nosec B701  # on for HTML; Markdown has its own escapes
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters["caption"] = pareto.caption
    environment.filters["alternative"] = pareto.alternative
    environment.filters["title_of"] = words.title
    return environment


def _breakable(text: object) -> Markup:
    """Return `text` escaped, with places where a long name may break."""
    return _broken(str(text))


@lru_cache(maxsize=4096)
def _broken(text: str) -> Markup:
    # A page says the same names over and over.
    if max(map(len, text.split()), default=0) <= UNBROKEN:
        return Markup(escape(text))  # nosec B704
    broken = re.sub(r"(_|/|::|\.(?=[a-z]))", r"\1<wbr>", escape(text))
    return Markup(broken)  # nosec B704  # escaped, and breaks of ours


def _sortable(
    value: float | None, text: str = "", factor: float = 1.0, exact: bool = True
) -> Markup:
    """Return the attribute `data-value` that a field sorts by, in its column's unit.

    Nothing is returned where there is no value, where the field's own `text` already is that
    number, or, unless the value must be `exact`, where `text` begins with it as it is shown.
    """
    if value is None:
        return Markup()
    number = f"{value / factor:.7g}"
    begins = _NUMBER.match(text)
    if begins and (not exact or float(begins[0].replace(",", "")) == float(number)):
        return Markup()
    spelled = number.replace("inf", "Infinity").replace("nan", "NaN")
    return Markup(f' data-value="{spelled}"')  # nosec B704  # a number


def _escape_markdown(value: object) -> object:
    """Return `value` as text that Markdown shows as it is, on one line."""
    return value if isinstance(value, Markup) else _escaped(str(value))


@lru_cache(maxsize=16384)
def _escaped(text: str) -> str:
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    # Within a word an underscore is plain text.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _code(value: object) -> Markup:
    """Return `value` as inline code that may stand in a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    # Within more backticks than it has itself, Markdown shows every text as it is.
    return Markup(f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`")  # nosec B704


def _fenced(value: object) -> Markup:
    """Return `value` as a block of code."""
    text = str(value)
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{ticks}\n{text}\n{ticks}")  # nosec B704  # as in `_code`
