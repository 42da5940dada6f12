"""A model in use: its blocks, the servers that hold them, and the route of a session."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swarmkit.drawing import svg
from swarmkit.drawing.servers import LEFT, RIGHT, block_width, server_rows
from swarmkit.drawing.values import HopPicture, PipelinePicture

_COLOUR = {"serving": svg.BLUE, "new": svg.GREEN, "lost": svg.RED}
_MARK = {"serving": "", "new": "↻ ", "lost": "✕ "}  # states are told apart without colour, too
_ROUTE_Y, _BOX = 34.0, 44.0


def pipeline_svg(picture: PipelinePicture, phase: float | None = None) -> str:
    """Draw the route, the time of each hop's last step, and all servers below.

    Args:
        phase: how far along the route the moving token is, from 0 to 1; None = no step runs.
    """
    scale = block_width(picture.num_blocks)
    middle = _ROUTE_Y + _BOX / 2
    parts = [svg.headline(_headline(picture))]
    parts.append(svg.line(84, middle, RIGHT, middle, 'stroke="currentColor" stroke-opacity="0.35"'))
    parts.append(svg.rect(8, _ROUTE_Y, 76, _BOX, svg.FILLS[svg.GREY], f'stroke="{svg.GREY}" rx="6"'))
    parts.append(svg.text(18, middle + 4, "this client", 11, f'style="color:{svg.INK}"'))
    longest = max((hop.total_ms for hop in picture.hops), default=0.0)
    for hop in picture.hops:
        parts += _hop(hop, LEFT + hop.start * scale, (hop.stop - hop.start) * scale, longest)
    for low, high in _gaps(picture):
        x, width = LEFT + low * scale + 2, (high - low) * scale - 4
        parts.append(
            svg.rect(x, _ROUTE_Y, width, _BOX, "none", f'stroke="{svg.GREY}" stroke-dasharray="4 3" rx="6"')
        )
    if phase is not None and picture.hops:
        x = 84 + (RIGHT - 84) * min(max(phase, 0.0), 1.0)
        parts.append(f'<circle cx="{svg.number(x)}" cy="{middle}" r="5" fill="{svg.AMBER}" stroke="#fff"/>')
    used = {hop.peer_id for hop in picture.hops if hop.state != "lost"}
    y, rows = server_rows(picture.num_blocks, picture.servers, used, _ROUTE_Y + _BOX + 34)
    parts += rows
    y += 16
    parts += svg.legend(y, [(svg.QUEUE, "queue"), (svg.COMPUTE, "compute"), (svg.NETWORK, "network")])
    for message in picture.messages:
        y += 17
        parts.append(svg.text(8, y, message, 11.5, fit=svg.WIDTH - 16))
    return svg.drawing(parts, y + 10, pipeline_text(picture))


def pipeline_text(picture: PipelinePicture) -> str:
    """The same in a few words."""
    route = " → ".join(f"{_MARK[hop.state]}{hop.label} [{hop.blocks}]" for hop in picture.hops)
    return f"{_headline(picture)}; route: {route or 'none yet'}"


def pipeline_rows(picture: PipelinePicture) -> list[Sequence[str]]:
    """A table of the route, its head first."""
    rows: list[Sequence[str]] = [("server", "blocks", "queue ms", "compute ms", "network ms", "state")]
    for hop in picture.hops:
        times = (f"{ms:.1f}" for ms in (hop.queue_ms, hop.compute_ms, hop.network_ms))
        rows.append((hop.label, hop.blocks, *times, hop.reason or hop.state))
    return rows


def slowest_part(hops: Sequence[HopPicture]) -> str:
    """What takes most of a token's time, as a sentence; empty when no step was measured."""
    parts = [
        (ms, kind, hop)
        for hop in hops
        for ms, kind in (
            (hop.queue_ms, "waiting for its turn"),
            (hop.compute_ms, "computing"),
            (hop.network_ms, "on the way"),
        )
    ]
    total = sum(ms for ms, _, _ in parts)
    if total <= 0:
        return ""
    ms, kind, hop = max(parts, key=lambda part: part[0])
    place = "to or from" if kind == "on the way" else "at"
    return f"Most of a token's time: {kind} {place} {hop.label} ({ms / total:.0%} of {total:.0f} ms)."


def _headline(picture: PipelinePicture) -> str:
    parts = [picture.model, f"{picture.num_blocks} blocks"]
    if picture.position:
        parts.append(f"{picture.position} tokens")
    if picture.tokens_per_s is not None:
        parts.append(f"{picture.tokens_per_s:.1f} tokens/s")
    return " · ".join(parts)


def _hop(hop: HopPicture, x: float, width: float, longest: float) -> Iterable[str]:
    colour = _COLOUR[hop.state]
    dashed = 'stroke-dasharray="5 3"' if hop.state == "lost" else ""
    times = f"queue {hop.queue_ms:.1f}, compute {hop.compute_ms:.1f}, network {hop.network_ms:.1f} ms"
    title = f"{hop.label}, blocks {hop.blocks}: {hop.reason or times}"
    extra = f'stroke="{colour}" stroke-width="1.6" rx="6" {dashed} data-peer="{hop.state}"'
    yield svg.rect(x + 2, _ROUTE_Y, width - 4, _BOX, svg.FILLS[colour], extra, title)
    ink = f'style="color:{svg.INK}"'
    yield svg.text(
        x + 10, _ROUTE_Y + 18, _MARK[hop.state] + hop.label, 12, f'font-weight="600" {ink}', fit=width - 16
    )
    what = hop.reason if hop.state == "lost" else f"blocks {hop.blocks}"
    yield svg.text(x + 10, _ROUTE_Y + 35, what, 11, ink, fit=width - 16)
    if hop.state == "lost" or longest <= 0:
        return
    y, left = _ROUTE_Y + _BOX + 6, x + 2
    unit = (width - 4) / longest
    bars = []
    for ms, fill in ((hop.queue_ms, svg.QUEUE), (hop.compute_ms, svg.COMPUTE), (hop.network_ms, svg.NETWORK)):
        bars.append(svg.rect(left, y, ms * unit, 7, fill))
        left += ms * unit
    yield svg.group(f"{hop.label}: {times}", bars)
    yield svg.text(x + 2, y + 19, f"{hop.total_ms:.1f} ms", 10.5, fit=width - 4)


def _gaps(picture: PipelinePicture) -> Iterable[tuple[int, int]]:
    """Blocks of the model that no hop is drawn for."""
    position = 0
    for hop in sorted(picture.hops, key=lambda each: each.start):
        if hop.start > position:
            yield position, hop.start
        position = max(position, hop.stop)
    if position < picture.num_blocks:
        yield position, picture.num_blocks
