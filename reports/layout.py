"""Lays out pages: templates filled, all text escaped, in HTML and in Markdown.

An HTML page is self-contained: its style, its scripts and its figures are in it, and its own policy
forbids every request (`templates/layout.html.jinja`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import plots, words

TEMPLATES = Path(__file__).with_name("templates")
"""By path: a folder `reports` where the program is called does not stand in its way."""


def html_page(template: str, svg: Mapping[str, str], **context: Any) -> str:
    """Return `template` filled with `context`; `svg` are its figures by name, trusted as markup."""
    environment = _environment(autoescape=True)
    environment.filters["breakable"] = _breakable
    environment.filters["sortable"] = _sortable
    return environment.get_template(template).render(
        **context,
        style=Markup((TEMPLATES / "style.css").read_text()),
        script=Markup((TEMPLATES / "sort.js").read_text()),
        svg={name: Markup(drawing) for name, drawing in svg.items()},
    )


def markdown_page(template: str, **context: Any) -> str:
    """Return `template` filled with `context`, every text escaped."""
    environment = _environment(finalize=_escape_markdown)
    environment.filters["code"] = _code
    environment.filters["fenced"] = _fenced
    environment.filters["raw"] = Markup
    text = environment.get_template(template).render(**context)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters["caption"] = plots.caption
    environment.filters["alternative"] = plots.alternative
    environment.filters["title_of"] = words.title
    return environment


def _breakable(text: object) -> Markup:
    """Return `text` escaped, with places where a long name may break."""
    return Markup(re.sub(r"(_|/|::|\.(?=[a-z]))", r"\1<wbr>", escape(str(text))))


def _sortable(value: float) -> str:
    """Return `value` as JavaScript's Number() reads it."""
    return repr(value).replace("inf", "Infinity").replace("nan", "NaN")


def _escape_markdown(value: object) -> object:
    """Return `value` as text that Markdown shows as it is, on one line."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    # Within a word an underscore is plain text.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _code(value: object) -> Markup:
    """Return `value` as inline code that may stand in a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`")


def _fenced(value: object) -> Markup:
    """Return `value` as a block of code."""
    text = str(value)
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{ticks}\n{text}\n{ticks}")
