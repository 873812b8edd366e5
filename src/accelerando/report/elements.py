"""HTML as a tree of the standard library's elements, so that every text is escaped by its serializer."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from accelerando.report import words

Child = Element | str | None


def el(tag: str, *children: Child, **attributes: str | None) -> Element:
    """An element; `class_="x"` is `class="x"`, underscores in other names are hyphens, None is left out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), words.clean(value))
    for child in children:
        if isinstance(child, str):
            _append(made, words.clean(child))
        elif child is not None:
            made.append(child)
    return made


def raw(tag: str, text: str, **attributes: str | None) -> Element:
    """A script or style element of our own, whose text is not escaped.

    Raises:
        ValueError: the text would end the element.
    """
    if re.search(rf"</{tag}|<!--", text, re.IGNORECASE):
        raise ValueError(f"the text of <{tag}> must not hold its end or a comment")
    made = el(tag, **attributes)
    made.text = text
    return made


def data(identity: str, value: Any) -> Element:
    """Plain data for a script to read; never executed."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return raw("script", text, type="application/json", id=identity)


def to_html(element: Element) -> str:
    return ElementTree.tostring(element, encoding="unicode", method="html")


def table(head: list[str], rows: list[list[Child]], caption: str, numeric: frozenset[int] = frozenset()) -> Element:
    """A table in a box that scrolls sideways on a narrow screen; `numeric` columns are set to the right."""

    def cell(tag: str, column: int, child: Child, **more: str | None) -> Element:
        return el(tag, child, class_="number" if column in numeric else None, **more)

    return el(
        "div",
        el(
            "table",
            el("caption", caption),
            el("thead", el("tr", *(cell("th", i, h, scope="col") for i, h in enumerate(head)))),
            el("tbody", *(el("tr", *(cell("td", i, c) for i, c in enumerate(row))) for row in rows)),
        ),
        class_="scroll wide" if len(head) > 3 else "scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def fine(text: str) -> str:
    """Our own figures with a page's typography: a true minus, a true times sign, and their like."""
    text = text.replace("+-", "\u00b1").replace(">=", "\u2265").replace("<=", "\u2264")
    text = re.sub(r"(?<=\d)x(?![\w])", "\u00d7", text)
    text = re.sub(r"(?<![\w\d.-])-(?=\d)", "\u2212", text)
    return re.sub(r"(?<=\d) us\b", " \u00b5s", text)


def _append(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text
