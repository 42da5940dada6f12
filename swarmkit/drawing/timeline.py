"""The last steps of a session as a waterfall: where the time of each one went, hop by hop."""

from __future__ import annotations

from collections.abc import Sequence

from swarmkit.drawing import svg
from swarmkit.drawing.values import StepPicture

_LEFT, _ROW = 96.0, 15.0


def timeline_svg(steps: Sequence[StepPicture], title: str = "steps") -> str:
    """Draw the steps one below the other, the newest at the top, on one scale of time."""
    parts = [svg.headline(timeline_text(steps, title))]
    longest = max((max(step.total_ms, sum(hop.total_ms for hop in step.hops)) for step in steps), default=1.0)
    unit = (svg.WIDTH - _LEFT - 64) / max(longest, 1e-6)
    y = 30.0
    for step in reversed(steps):
        mark = "↻ " if step.recovered else ""
        what = f"{mark}#{step.number} +{step.tokens}"
        parts.append(svg.text(8, y + 10, what, 10.5, fit=_LEFT - 12))
        x = _LEFT
        for hop in step.hops:
            times = f"queue {hop.queue_ms:.1f}, compute {hop.compute_ms:.1f}, network {hop.network_ms:.1f} ms"
            note = f"step {step.number}, {hop.label} [{hop.blocks}]: {times}"
            bars = []
            for ms, fill in (
                (hop.queue_ms, svg.QUEUE),
                (hop.compute_ms, svg.COMPUTE),
                (hop.network_ms, svg.NETWORK),
            ):
                bars.append(svg.rect(x, y, ms * unit, _ROW - 4, fill))
                x += ms * unit
            bars.append(svg.line(x, y, x, y + _ROW - 4, 'stroke="#fff" stroke-width="1.5"'))
            parts.append(svg.group(note, bars))
        if step.recovered:
            lost = f"step {step.number}: a server was lost and replaced on the way"
            rest = max(0.0, _LEFT + step.total_ms * unit - x)
            parts.append(svg.rect(x, y, rest, _ROW - 4, svg.FILLS[svg.RED], f'stroke="{svg.RED}"', lost))
            x += rest
        parts.append(svg.text(x + 6, y + 10, f"{step.total_ms:.1f} ms", 10.5))
        y += _ROW
    y += 14
    parts += svg.legend(y, [(svg.QUEUE, "queue"), (svg.COMPUTE, "compute"), (svg.NETWORK, "network")])
    return svg.drawing(parts, y + 8, timeline_text(steps, title))


def timeline_text(steps: Sequence[StepPicture], title: str = "steps") -> str:
    """The same in a few words."""
    if not steps:
        return f"{title}: no step yet"
    middle = sorted(step.total_ms for step in steps)[len(steps) // 2]
    recovered = sum(step.recovered for step in steps)
    after = f", {recovered} with a lost server" if recovered else ""
    return f"{title}: the last {len(steps)}, {middle:.1f} ms in the middle{after}"


def timeline_rows(steps: Sequence[StepPicture]) -> list[Sequence[str]]:
    """A table of the steps, its head first and the newest step last."""
    rows: list[Sequence[str]] = [("step", "tokens", "ms", "queue", "compute", "network", "route")]
    for step in steps:
        sums = (
            sum(hop.queue_ms for hop in step.hops),
            sum(hop.compute_ms for hop in step.hops),
            sum(hop.network_ms for hop in step.hops),
        )
        route = " → ".join(hop.label for hop in step.hops)
        rows.append(
            (str(step.number), str(step.tokens), f"{step.total_ms:.1f}", *(f"{ms:.1f}" for ms in sums), route)
        )
    return rows
