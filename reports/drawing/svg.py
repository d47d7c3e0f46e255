"""Makes a drawing of matplotlib's part of a page: small, in the page's colours, with titled links.

A page of 500 cells carries many drawings, so ids that nothing refers to, groups that say nothing,
digits that no screen shows and styles that every point of a set repeats are left out.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET  # nosec B405  # see for_page
from collections.abc import Iterator, Mapping

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
LINK = f"{{{XLINK}}}href"
KEPT_TAGS = frozenset(
    f"{{{SVG}}}{name}"
    for name in ("g", "a", "title", "defs", "clipPath", "rect", "path", "use", "text", "tspan")
)
DROPPED_STYLES = frozenset({"font-family", "text-anchor: start"})
"""What the page says itself, and what is so anyway."""


def for_page(svg: str, titles: Mapping[str, str], prefix: str, variables: Mapping[str, str]) -> str:
    """Return matplotlib's SVG as a page's element: own ids, the page's colours, titled links.

    Args:
        svg: what matplotlib wrote.
        titles: of links, by the id that each goes to.
        prefix: put before every id, since drawings share a page.
        variables: the colour that each CSS variable of the page stands for in the drawing.
    """
    # matplotlib has just written it: no entity or document type of somebody else's is in it.
    root = ET.fromstring(svg)  # nosec B314
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    _clean(root)
    for link in root.iter(f"{{{SVG}}}a"):
        target = link.attrib.pop(LINK)
        link.attrib = {"href": target}
        title = ET.Element(f"{{{SVG}}}title")
        title.text = titles[target.removeprefix("#")]
        link.insert(0, title)
    _rename(root, prefix)
    _hoist(root)
    _flatten(root)
    ET.register_namespace("", SVG)
    text = ET.tostring(root, encoding="unicode")
    for name, colour in variables.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _clean(element: ET.Element) -> None:
    """Leave out what a page does not show, in `element` and below."""
    element.tail = None
    if not element.tag.endswith("}text"):
        element.text = None
    for child in list(element):
        if child.tag in KEPT_TAGS:
            _clean(child)
        else:
            element.remove(child)
    for name in ("d", "x", "y"):
        if name in element.attrib:
            element.set(name, _rounded(element.attrib[name]))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if "style" in element.attrib:
        said = (part.strip() for part in element.attrib["style"].split(";"))
        kept = [
            part
            for part in said
            if part not in DROPPED_STYLES and part.partition(":")[0] not in DROPPED_STYLES
        ]
        element.set("style", ";".join(part.replace(": ", ":") for part in kept))


def _rounded(numbers: str) -> str:
    """Return `numbers` with one decimal, a path's on one line."""
    shorter = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}", numbers)
    return re.sub(r"\.0(?!\d)", "", " ".join(shorter.split()))


def _rename(root: ET.Element, prefix: str) -> None:
    """Give the ids that something refers to short names, drop the others."""
    used: dict[str, str] = {}
    own = {element.get("id") for element in root.iter()}
    for element in root.iter():
        for name, value in element.attrib.items():
            found = re.fullmatch(r"url\(#(.+)\)|#(.+)", value)
            target = (found[1] or found[2]) if found else None
            if target in own and target is not None:
                short = used.setdefault(target, f"{prefix}-{len(used) + 1}")
                element.set(name, value.replace(target, short))
        if LINK in element.attrib:
            element.set("href", element.attrib.pop(LINK))
    for element in root.iter():
        if "id" in element.attrib:
            short = used.get(element.attrib.pop("id"), "")
            if short:
                element.set("id", short)


def _hoist(root: ET.Element) -> None:
    """Say a style that all drawn parts of a group share once, at the group."""
    for group in root.iter(f"{{{SVG}}}g"):
        drawn = [part for part in _drawn(group) if part.tag.endswith("}use")]
        styles = {part.get("style") for part in drawn}
        if len(drawn) > 1 and len(styles) == 1 and len(drawn) == len(list(_drawn(group))):
            style = styles.pop()
            if style and "style" not in group.attrib:
                group.set("style", style)
                for part in drawn:
                    del part.attrib["style"]


def _drawn(group: ET.Element) -> Iterator[ET.Element]:
    """Yield what `group` draws, definitions left out."""
    for child in group:
        if child.tag.endswith(("}use", "}path", "}text", "}rect")):
            yield child
        elif not child.tag.endswith("}defs"):
            yield from _drawn(child)


def _flatten(element: ET.Element) -> None:
    """Put the parts of groups that say nothing where the group stood; drop empty ones."""
    flat: list[ET.Element] = []
    for child in element:
        _flatten(child)
        is_group = child.tag.endswith(("}g", "}defs"))
        if is_group and not len(child):
            continue
        if child.tag.endswith("}g") and not child.attrib:
            flat += list(child)
        else:
            flat.append(child)
    element[:] = flat
