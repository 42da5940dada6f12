"""How training goes: the loss, and which server does how much of the work."""

from __future__ import annotations

from collections.abc import Sequence

from swarmkit.drawing import svg
from swarmkit.drawing.values import TrainingPicture

_TOP, _HEIGHT, _LEFT = 32.0, 150.0, 52.0
_MOST_POINTS = 400
"""Points of the curve; more than that cannot be told apart."""


def training_svg(picture: TrainingPicture) -> str:
    """Draw the loss over steps, and a bar for each server with the micro-batches that it did."""
    parts = [svg.headline(training_text(picture))]
    parts += _curve(picture.losses)
    y = _TOP + _HEIGHT + 26
    most = max(picture.shares.values(), default=1)
    for label, count in sorted(picture.shares.items()):
        parts.append(svg.text(8, y + 11, label, 11, fit=170))
        width = (svg.WIDTH - 260) * count / most
        parts.append(svg.rect(184, y, width, 14, svg.BLUE, 'rx="3"', f"{label}: {count} micro-batches"))
        parts.append(svg.text(190 + width, y + 11, str(count), 11))
        y += 20
    return svg.drawing(parts, y + 6, training_text(picture))


def training_text(picture: TrainingPicture) -> str:
    """The same in a few words."""
    parts = [f"{len(picture.losses) if picture.steps is None else picture.steps} steps"]
    if picture.losses:
        parts.append(f"loss {picture.losses[-1] if picture.loss is None else picture.loss:.4g}")
    if picture.tokens_per_s:
        parts.append(f"{picture.tokens_per_s:.0f} tokens/s")
    if picture.lost:
        parts.append(f"{picture.lost} micro-batches done again after a lost server")
    return " · ".join(parts)


def training_rows(picture: TrainingPicture) -> list[Sequence[str]]:
    """A table of the servers' shares, its head first."""
    rows: list[Sequence[str]] = [("server", "micro-batches")]
    rows += [(label, str(count)) for label, count in sorted(picture.shares.items())]
    return rows


def _curve(losses: Sequence[float]) -> list[str]:
    right, bottom = svg.WIDTH - 8.0, _TOP + _HEIGHT
    parts = [
        svg.line(_LEFT, _TOP, _LEFT, bottom, 'stroke="currentColor" stroke-opacity="0.5"'),
        svg.line(_LEFT, bottom, right, bottom, 'stroke="currentColor" stroke-opacity="0.5"'),
        svg.text(svg.WIDTH / 2, bottom + 15, "step", 10.5, 'text-anchor="middle" fill-opacity="0.75"'),
    ]
    count, last = min(len(losses), _MOST_POINTS), max(1, len(losses) - 1)
    places = [place * last // max(1, count - 1) for place in range(count)]
    finite = [(place, losses[place]) for place in places if abs(losses[place]) < float("inf")]
    if not finite:
        return parts
    low, high = min(loss for _, loss in finite), max(loss for _, loss in finite)
    high = high if high > low else low + 1.0
    points = []
    for place, loss in finite:
        x = _LEFT + (right - _LEFT) * place / last
        y = bottom - 6 - (_HEIGHT - 12) * (loss - low) / (high - low)
        points.append(f"{svg.number(x)},{svg.number(y)}")
    parts.append(
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{svg.BLUE}" stroke-width="1.8"/>'
    )
    parts.append(svg.text(8, _TOP + 10, f"{high:.3g}", 10.5, fit=_LEFT - 10))
    parts.append(svg.text(8, bottom - 2, f"{low:.3g}", 10.5, fit=_LEFT - 10))
    return parts
