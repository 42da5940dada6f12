"""When a client tries again to reach a peer directly: decisions only, over times that it is told."""

from __future__ import annotations

from typing import Literal

DirectOutcome = Literal["connected", "turned away", "not reached"]
"""What came of a try. A peer that was reached, and did not welcome the connection, has turned it away."""

NOT_REACHED_S = 600.0
"""For so long a peer is not tried that could not be reached: a firewall stays where it is."""
TURNED_AWAY_S = 2.0
"""After a peer has turned a connection away for the first time: it was busy, and may soon be less so. The
pause doubles each time, up to the one after a peer that was not reached.
"""


class DirectTries:
    """The peers that could not be had directly, and for how long they are left alone."""

    def __init__(self) -> None:
        self._left_alone: dict[str, tuple[float, float]] = {}
        """By peer id: until when, and for how long after having been turned away; 0 = was not reached."""

    def __len__(self) -> int:
        return len(self._left_alone)

    def may_try(self, peer_id: str, now: float) -> bool:
        """Whether a peer may be tried now."""
        until, _ = self._left_alone.get(peer_id, (now, 0.0))
        return until <= now

    def note(self, peer_id: str, outcome: DirectOutcome, now: float) -> None:
        """Remember what came of a try."""
        self._forget_old(now)
        _, last_s = self._left_alone.pop(peer_id, (0.0, 0.0))
        if outcome == "turned away":
            pause_s = min(2 * last_s or TURNED_AWAY_S, NOT_REACHED_S)
            self._left_alone[peer_id] = now + pause_s, pause_s
        elif outcome == "not reached":
            self._left_alone[peer_id] = now + NOT_REACHED_S, 0.0

    def _forget_old(self, now: float) -> None:
        """Forget peers that could have been tried again for as long as they were left alone, and were not."""
        for peer_id in [peer for peer, (until, s) in self._left_alone.items() if until + s <= now]:
            del self._left_alone[peer_id]
