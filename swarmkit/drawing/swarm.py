"""Which servers have which blocks of a model, and which blocks would be missing without one of them."""

from __future__ import annotations

from collections.abc import Sequence

from swarmkit.drawing import svg
from swarmkit.drawing.servers import LEFT, block_width, server_rows
from swarmkit.drawing.values import ServerPicture


def coverage(num_blocks: int, servers: Sequence[ServerPicture]) -> list[int]:
    """How many servers that are online have each block."""
    counts = [0] * num_blocks
    for server in servers:
        if server.state == "online":
            for block in range(max(0, server.start), min(server.stop, num_blocks)):
                counts[block] += 1
    return counts


def least_covered(num_blocks: int, servers: Sequence[ServerPicture]) -> tuple[int, int]:
    """The blocks of one of the servers, running or not, which the fewest running servers have.

    Args:
        servers: one at least.
    """
    counts = coverage(num_blocks, servers)
    chosen = min(servers, key=lambda each: (min(counts[each.start : each.stop], default=0), each.start))
    return chosen.start, chosen.stop


def swarm_svg(model: str, num_blocks: int, servers: Sequence[ServerPicture]) -> str:
    """Draw the servers of each block; blocks that no server has are red."""
    scale = block_width(num_blocks)
    counts = coverage(num_blocks, servers)
    parts = [svg.headline(swarm_text(model, num_blocks, servers))]
    y = 30.0
    parts.append(svg.text(8, y + 15, "replicas", 11, 'fill-opacity="0.75"'))
    for block, count in enumerate(counts):
        colour = svg.RED if count == 0 else svg.AMBER if count == 1 else svg.GREEN
        title = f"block {block}: {count or 'no'} server{'' if count == 1 else 's'}"
        x = LEFT + block * scale
        parts.append(svg.rect(x + 0.5, y, scale - 1, 22, svg.FILLS[colour], f'stroke="{colour}"', title))
        shown = str(count) if count else "✕"
        ink = f'text-anchor="middle" style="color:{svg.INK}"'
        if scale >= 12:
            parts.append(svg.text(x + scale / 2, y + 15, shown, 11, ink))
    online = {server.peer_id for server in servers if server.state == "online"}
    y, rows = server_rows(num_blocks, servers, online, y + 26)
    parts += rows
    return svg.drawing(parts, y + 6, swarm_text(model, num_blocks, servers))


def swarm_text(model: str, num_blocks: int, servers: Sequence[ServerPicture]) -> str:
    """The same in a few words."""
    counts = coverage(num_blocks, servers)
    online = sum(server.state == "online" for server in servers)
    parts = [model, f"{num_blocks} blocks", f"{online} server{'' if online == 1 else 's'}"]
    missing = _ranges([block for block, count in enumerate(counts) if count == 0])
    single = _ranges([block for block, count in enumerate(counts) if count == 1])
    if missing:
        parts.append(f"without a server: {missing}")
    elif single:
        parts.append(f"on one server only: {single}")
    return " · ".join(parts)


def swarm_rows(servers: Sequence[ServerPicture]) -> list[Sequence[str]]:
    """A table of the servers, its head first."""
    rows: list[Sequence[str]] = [("server", "blocks", "state", "tokens/s", "free cache tokens", "dtype")]
    for server in sorted(servers, key=lambda each: (each.start, each.stop, each.label)):
        figures = (f"{server.throughput:.0f}", f"{server.free_cache_tokens}", server.dtype)
        rows.append((server.label, server.blocks, server.state, *figures))
    return rows


def _ranges(blocks: Sequence[int]) -> str:
    """Blocks as ranges, such as "0:4, 6:8"."""
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return ", ".join(f"{low}:{high}" for low, high in found)
