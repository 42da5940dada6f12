"""The few parts that all drawings are made of. They escape all text, much of which comes from peers."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

WIDTH = 760
"""Units across a drawing, which is scaled to the width of the page."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

BLUE, GREEN, RED, AMBER, GREY = "#2f74d0", "#177245", "#b3261e", "#b45309", "#5f6b7a"
"""Strokes and bars; each stands out from white and from black, and from the others for the colour-blind."""

QUEUE, COMPUTE, NETWORK = AMBER, BLUE, GREY

FILLS = {BLUE: "#dbe8fb", GREEN: "#d7f0e2", RED: "#fbdedc", AMBER: "#fbe8cf", GREY: "#e6e9ee"}
INK = "#14202e"
"""Text on one of the fills."""

_CHARACTER = 0.56
"""Width of an average character, as a share of the font's size."""


def number(value: float) -> str:
    """A coordinate, in as few characters as it needs."""
    return f"{value:.1f}".removesuffix(".0")


def rect(x: float, y: float, width: float, height: float, fill: str, extra: str = "", title: str = "") -> str:
    """A rectangle; `title` is shown where the pointer rests, and read to those who cannot see it."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    shape = (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(max(0.0, width))}" height="{number(height)}"'
    )
    return f'{shape} fill="{fill}" {extra}>{inner}</rect>'


def group(title: str, parts: Iterable[str]) -> str:
    """Parts that belong together; `title` is shown where the pointer rests, and told by keyboard."""
    return f"<g><title>{escape(title)}</title>{''.join(parts)}</g>"


def text(
    x: float, y: float, content: str, size: float = 12, extra: str = "", fit: float | None = None
) -> str:
    """A line of text that starts at (x, y).

    Args:
        fit: the width that it may take; it is cut short to fit, and left out where almost nothing fits.
    """
    if fit is not None:
        most = int(fit / (size * _CHARACTER))
        if most < 3:
            return ""
        content = content if len(content) <= most else content[: most - 1] + "…"
    return (
        f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}" fill="currentColor" {extra}>'
        f"{escape(content)}</text>"
    )


def headline(content: str) -> str:
    """The first line of a drawing."""
    return text(8, 18, content, 13, 'font-weight="600"', fit=WIDTH - 16)


def line(x1: float, y1: float, x2: float, y2: float, extra: str = 'stroke="currentColor"') -> str:
    """A straight line."""
    return f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" {extra}/>'


def drawing(parts: list[str], height: float, label: str) -> str:
    """A whole drawing, whose text takes the colour of the page around it.

    Args:
        label: what it shows, for those who cannot see it.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(height)}" width="100%" '
        'role="img" '
        f'aria-label="{escape(label)}" font-family="{FONT}" style="max-width:{WIDTH}px;display:block">'
        + "".join(parts)
        + "</svg>"
    )


def on_card(svg: str) -> str:
    """The same drawing on a light ground of its own, for places where it is shown as an image."""
    ground = f'<rect width="100%" height="100%" rx="8" fill="#ffffff"/><g color="{INK}">'
    start = svg.index(">") + 1
    return svg[:start] + ground + svg[start:].removesuffix("</svg>") + "</g></svg>"


def legend(y: float, entries: list[tuple[str, str]], x: float = 8) -> list[str]:
    """A row of coloured squares, each with its meaning."""
    parts = []
    for colour, meaning in entries:
        parts.append(rect(x, y - 9, 10, 10, colour, 'rx="2"'))
        parts.append(text(x + 14, y, meaning, 11))
        x += 14 + len(meaning) * 11 * _CHARACTER + 18
    return parts
