"""How one server moves beside others that may move at the same moment, step by step.

A server tells the others where it means to go, waits until all of them can know it, looks again, and goes
only if the place is still the best beside those that mean to go there too. It leaves its blocks when it is
its turn (`intentions.py` decides that). Real servers and those of the simulation take the same steps. How
they look, how they tell, and how time passes is handed in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from swarmkit.placement.intentions import TURNS, AnnouncedRun, Span, may_leave

Pause = Callable[[], Awaitable[object]]
"""Waits until all others can know what was told before."""


class MovingServer(Protocol):
    """What a server does that looks for a better place."""

    async def look(self, before: Collection[str] | None) -> tuple[Span | None, Collection[str]]:
        """The blocks where it is needed more, as things stand, or None if it had better stay; and the peers
        that mean to move.

        Args: before: peers that meant to move before this one did; None = this one does not mean to.
        """

    async def tell(self, blocks: Span | None) -> None:
        """Tell the others which blocks it means to go to; None = it stays, or has gone."""

    async def go(self, blocks: Span) -> None:
        """Serve these blocks instead, as soon as `is_turn` says that it may leave."""


async def move_if_needed(server: MovingServer, pause: Pause) -> None:
    """Have a server look, and go where it is needed more, if it still is when the others know of that."""
    wanted, before = await server.look(None)
    try:
        for _ in range(TURNS):
            if wanted is None:
                return
            told = wanted
            await server.tell(told)
            await pause()
            wanted, _ = await server.look(before)
            if wanted == told:
                return await server.go(told)
    finally:
        await server.tell(None)


async def is_turn(
    own_id: str,
    held: Span,
    kept: Span | None,
    others: Callable[[], Awaitable[Sequence[AnnouncedRun]]],
    pause: Pause,
    *,
    wanted: Span | None = None,
    num_blocks: int = 0,
) -> bool:
    """Whether a server may leave its blocks, after it has told so; waits some turns for others to withdraw.

    Args:
        held, kept, wanted, num_blocks: see `may_leave`.
        others: looks at what the other peers announce.
    """
    for _ in range(TURNS):
        verdict = may_leave(own_id, held, kept, await others(), wanted=wanted, num_blocks=num_blocks)
        if verdict != "wait":
            return verdict == "go"
        await pause()
    return False
