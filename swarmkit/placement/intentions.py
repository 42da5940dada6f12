"""Which servers that mean to move may go, and where they count meanwhile. Pure.

Several servers that see the same need at the same moment must neither all meet it nor all leave the blocks
that they have. So a server first announces where it means to go. It waits until that is known to all, looks
again, and goes only if others serve the blocks that it leaves, of which it counts nobody who means to leave.

No block loses its last server in this way, however many move, as long as an announcement is known to all
within the time that each of them waits. Of the servers of a block that leave, take the one that looked last.
It counted on another one, which had announced no intention by then that could be seen. If that one leaves,
too, it announced its intention, waited, and looked after that: later than the one that looked last.

Where some block has no server, there is no route that could be lost. A server then leaves even blocks that it
alone has, if more blocks have a server when it has moved: otherwise servers that overlap a little, each the
only one of some block, would hold each other fast for ever.

Whose intention gives way decides only who goes first: the peer with the smaller id waits for the others to
withdraw theirs, for some turns. Nobody gains by announcing intentions: a server that means to leave counts
for as much as one that is not there, and one that means to come for as much as one that says it has come,
until it has taken too long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from swarmkit.placement.ranges import uncovered

TURNS = 3
"""A server whose turn it is looks so many times, a notice apart, whether the others have withdrawn."""

OVERDUE_S = 900.0
"""After which a peer that loads blocks, or means to, counts no longer where it means to go."""

Span = tuple[int, int]
Verdict = Literal["go", "wait", "stay"]


@dataclass(frozen=True)
class AnnouncedRun:
    """A run of blocks [start, stop) that another peer announces.

    Attributes:
        is_online: clients can use it; else the peer still loads it.
        moving_to: the blocks that the peer means to serve instead.
    """

    peer_id: str
    start: int
    stop: int
    is_online: bool = True
    moving_to: Span | None = None


class Overdue:
    """Remembers since when peers are about to serve blocks, look after look."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def at(self, now: float, runs: Sequence[AnnouncedRun], most_s: float = OVERDUE_S) -> Collection[str]:
        """The peers that have been about to serve blocks at each look for more than `most_s` seconds."""
        about_to = {one.peer_id for one in runs if one.moving_to is not None or not one.is_online}
        self._since = {peer_id: self._since.get(peer_id, now) for peer_id in about_to}
        return {peer_id for peer_id, since in self._since.items() if now - since > most_s}


def expected(
    own_id: str,
    runs: Sequence[AnnouncedRun],
    before: Collection[str] | None = None,
    overdue: Collection[str] = (),
) -> list[tuple[int, Span]]:
    """Where the others are about to serve, as far as can be seen: the runs by number, and their blocks.

    A peer that loads blocks is about to leave those that it has. One that means to move counts where it means
    to go; but of those that decided at the same moment as this server, only the ones with smaller ids do, and
    the others are left to yield.

    Args:
        own_id: the peer that looks.
        before: peers that meant to move before this one did; None = this one does not mean to.
        overdue: peers that count where they are, whatever they mean to do.
    """
    loading = {one.peer_id for one in runs if not one.is_online} - set(overdue)
    served = {(one.peer_id, one.start, one.stop) for one in runs}
    found: list[tuple[int, Span]] = []
    for number, one in enumerate(runs):
        if one.is_online == (one.peer_id in loading):
            continue
        if one.moving_to is None or one.peer_id in overdue:
            found.append((number, (one.start, one.stop)))
        elif (one.peer_id, *one.moving_to) not in served:
            goes = before is None or one.peer_id in before or one.peer_id < own_id
            found.append((number, one.moving_to if goes else (one.start, one.stop)))
    return found


def may_leave(
    own_id: str,
    held: Span,
    kept: Span | None,
    runs: Sequence[AnnouncedRun],
    *,
    wanted: Span | None = None,
    num_blocks: int = 0,
) -> Verdict:
    """Whether a server may leave its blocks, once all others know that it means to.

    Args:
        held: the blocks that it serves.
        kept: blocks that it serves without a break when it goes; None = it serves none meanwhile.
        runs: of the other peers.
        wanted: the blocks that it goes to; None = it goes away.
        num_blocks: of the whole model.

    Returns:
        "wait" if it may when those have withdrawn that it goes before; "stay" if it is needed, or if another
        one goes before it.
    """
    number = Counter(one.peer_id for one in runs)
    # A peer with several runs may be in the middle of a move, whatever it says.
    online = [one for one in runs if one.is_online and number[one.peer_id] == 1]
    staying = [*_spans(one for one in online if one.moving_to is None), *([kept] if kept else [])]
    lacking = uncovered(*held, staying)
    if not lacking or (wanted and _fills_gap(held, wanted, runs, num_blocks)):
        return "go"
    others = [one for one in online if one.moving_to and _holds_some(one, lacking)]
    if uncovered(*held, [*staying, *_spans(others)]) or own_id > min(one.peer_id for one in others):
        return "stay"
    return "wait"


def _fills_gap(held: Span, wanted: Span, runs: Sequence[AnnouncedRun], num_blocks: int) -> bool:
    """Whether more blocks have a server, or are about to, when one has moved: if those that mean to move are
    still there, and if they are not.
    """

    def lacking(own: Span, others: Iterable[AnnouncedRun]) -> int:
        return sum(stop - start for start, stop in uncovered(0, num_blocks, [own, *_spans(others)]))

    staying = [one for one in runs if one.moving_to is None]
    return all(lacking(wanted, others) < lacking(held, others) for others in (runs, staying))


def _spans(runs: Iterable[AnnouncedRun]) -> list[Span]:
    return [(one.start, one.stop) for one in runs]


def _holds_some(run: AnnouncedRun, blocks: Iterable[Span]) -> bool:
    return any(run.start < stop and start < run.stop for start, stop in blocks)
