"""Servers below a ruler of blocks, in as few rows as possible."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from swarmkit.drawing import svg
from swarmkit.drawing.values import ServerPicture

LEFT, RIGHT = 96.0, svg.WIDTH - 8.0
"""Where the first block begins, and where the last one ends."""

MOST_LANES = 12
"""Rows of servers that are drawn; the rest is counted."""

_TICKS = (1, 2, 4, 5, 8, 10, 20, 50, 100, 1_000, 10_000, 100_000)


def block_width(num_blocks: int) -> float:
    """Units across that one block takes."""
    return (RIGHT - LEFT) / max(1, num_blocks)


def lanes(servers: Sequence[ServerPicture]) -> list[list[ServerPicture]]:
    """Put each server into the first row in which its blocks are free."""
    rows: list[list[ServerPicture]] = []
    for server in sorted(servers, key=lambda each: (each.start, -each.stop, each.label)):
        row = next((row for row in rows if row[-1].stop <= server.start), None)
        if row is None:
            rows.append([server])
        else:
            row.append(server)
    return rows


def server_rows(
    num_blocks: int, servers: Sequence[ServerPicture], in_use: Collection[str], y: float
) -> tuple[float, list[str]]:
    """Draw the ruler and the servers from `y` downwards; returns where they end, and the parts.

    Args:
        in_use: peer ids of the servers that are filled with colour.
    """
    scale = block_width(num_blocks)
    every = next((step for step in _TICKS if step * scale >= 22), _TICKS[-1])
    parts = [svg.text(8, y + 12, "servers", 11, 'fill-opacity="0.75"')]
    for block in range(0, num_blocks + 1, every):
        x = LEFT + block * scale
        parts.append(svg.line(x, y + 16, x, y + 20, 'stroke="currentColor" stroke-opacity="0.5"'))
        parts.append(svg.text(x, y + 12, str(block), 10, 'text-anchor="middle" fill-opacity="0.75"'))
    y += 24
    rows = lanes(servers)
    for lane in rows[:MOST_LANES]:
        for server in lane:
            parts += _server(server, scale, y, server.peer_id in in_use)
        y += 20
    if len(rows) > MOST_LANES:
        more = sum(len(lane) for lane in rows[MOST_LANES:])
        parts.append(svg.text(LEFT, y + 12, f"and {more} more servers", 11, 'fill-opacity="0.75"'))
        y += 20
    return y, parts


def _server(server: ServerPicture, scale: float, y: float, in_use: bool) -> Iterable[str]:
    x, width = LEFT + server.start * scale, (server.stop - server.start) * scale
    is_online = server.state == "online"
    plain = svg.BLUE if in_use else svg.GREY
    colour = plain if is_online else svg.RED if server.state == "lost" else svg.AMBER
    fill = svg.FILLS[colour] if in_use or not is_online else "none"
    title = f"{server.label}, blocks {server.blocks}, {server.state}, {server.throughput:.0f} tokens/s"
    yield svg.rect(x + 2, y, width - 4, 16, fill, f'stroke="{colour}" rx="4"', title)
    ink = f'style="color:{svg.INK}"' if fill != "none" else ""
    mark = "✕ " if server.state == "lost" else ""
    note = "" if is_online else f" ({server.state})"
    yield svg.text(x + 8, y + 12, mark + server.label + note, 10.5, ink, fit=width - 14)
