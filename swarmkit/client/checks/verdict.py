"""Which server is asked for a second opinion, and which one is wrong where two differ? Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from swarmkit.client.routing.route import Hop
from swarmkit.net.registry.records import Announcement


@dataclass
class Standing:
    """How far a server of a session can be blamed for the outputs that the client has.

    Attributes:
        own_from: the position from which on they are this server's, and not those of one before it.
        pushed_by: the peer that pushes it its inputs, or was asked to; empty where the client sends them.
        keys_from: the server, by service id, that brought it keys and values; empty where it computed all of
            them itself.
        is_doubted: whether it computed something else than another server, perhaps from other inputs.
    """

    own_from: int = 0
    pushed_by: str = ""
    keys_from: str = ""
    is_doubted: bool = False

    def crop(self, tokens: int) -> None:
        """The outputs from position `tokens` on will be new ones."""
        self.own_from = min(self.own_from, tokens)
        if not tokens:
            self.keys_from = ""


def witnesses(
    hop: Hop,
    servers: Iterable[Announcement],
    without: Collection[str],
    may_ask: Callable[[Announcement], bool],
) -> list[Hop]:
    """The servers of other peers that hold all blocks of a hop.

    What they claim of their speed does not matter: liars would claim the most to judge each other.

    Args:
        without: peer ids that are not asked.
        may_ask: whether nothing speaks against a server.
    """
    return [
        Hop(server, hop.start, hop.stop)
        for server in servers
        if server.start <= hop.start
        and hop.stop <= server.stop
        and server.peer_id not in without
        and may_ask(server)
    ]


def loser(first_third: float, second_third: float) -> Literal["first", "second"] | None:
    """Which of two servers that differ is wrong, by a third one; None if that does not decide it.

    Args: first_third, second_third: how far each is from the third, as `agreement.excess` tells.
    """
    if first_third <= 1 < second_third:
        return "second"
    if second_third <= 1 < first_third:
        return "first"
    return None
