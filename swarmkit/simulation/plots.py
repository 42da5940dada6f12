"""Curves as plain SVG, so that no plotting library is needed and changes can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 34, 40
_COLOURS = ("#2a7", "#c63", "#36c", "#888", "#a3a")

Curve = Sequence[tuple[float, float]]


def draw_curves(title: str, x_label: str, y_label: str, curves: Mapping[str, Curve]) -> str:
    """A picture with one line for each curve, by its name, from x and y = 0 or below on."""
    points = [point for curve in curves.values() for point in curve]
    x_most = max((x for x, _ in points), default=1.0) or 1.0
    x_least = min((x for x, _ in points), default=0.0)
    y_most = max((y for _, y in points), default=1.0) * 1.05 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_least) / max(x_most - x_least, 1e-12)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / y_most * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = share * y_most / 1.05
        _, height = at(x_least, y)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        )
        x = x_least + share * (x_most - x_least)
        across, _ = at(x, 0)
        parts.append(
            f'<text x="{across:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:.3g}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end" fill="#555">'
        f"{escape(x_label)}</text>"
        f'<text x="4" y="30" fill="#555">{escape(y_label)}</text>'
    )
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(
            f'<text x="{_WIDTH - _RIGHT - 150 * (len(curves) - number - 1)}" y="18" text-anchor="end" '
            f'fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """For each value, which share of all is no greater."""
    ordered = sorted(values)
    return [(value, (number + 1) / len(ordered)) for number, value in enumerate(ordered)]
