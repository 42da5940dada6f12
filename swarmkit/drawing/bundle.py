"""One object in every form that notebooks know: text, an image, and HTML with a table of the same facts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from swarmkit.drawing.svg import FONT, on_card


def bundle(text: str, svg: str, rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """The forms by MIME type.

    Args:
        rows: a table with the same facts, its head first, for readers and pages that show no drawing.
    """
    return {"text/plain": text, "image/svg+xml": on_card(svg), "text/html": html(text, svg, rows)}


def html(text: str, svg: str, rows: Sequence[Sequence[str]]) -> str:
    """The drawing, and below it the table, folded in where the page can fold."""
    return (
        f'<div class="swarmkit" style="font-family:{FONT};max-width:780px">{svg}'
        f"<details><summary>{escape(text)}</summary>{table(rows)}</details></div>"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first row is its head."""
    head, *body = rows
    cells = "".join(
        f'<th scope="col" style="text-align:left;padding:2px 10px">{escape(cell)}</th>' for cell in head
    )
    lines = "".join(
        "<tr>" + "".join(f'<td style="padding:2px 10px">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in body
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"
