"""When does what is sent over a link arrive? The link emulator's arithmetic, without sockets or clocks."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from swarmkit.errors import UsageError

_UNLIMITED_WINDOW_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class EmulatedLink:
    """How one direction of a connection fares."""

    delay_s: float = 0.0
    """From one end to the other."""
    jitter_s: float = 0.0
    """Up to so much is added to the delay of each piece, evenly spread; order is kept all the same."""
    bandwidth: float = math.inf
    """Bit/s, shared by all connections of the link."""
    queue_bytes: int = 256 * 1024
    """What may wait for its turn on the link, per connection, before the sender has to wait."""

    def __post_init__(self) -> None:
        if min(self.delay_s, self.jitter_s) < 0 or self.bandwidth <= 0 or self.queue_bytes < 1:
            raise UsageError(
                f"a link needs times of 0 or more, a bandwidth above 0 and room for a byte; got {self}"
            )

    @property
    def is_plain(self) -> bool:
        """Whether it passes everything on at once."""
        return self.delay_s == 0 and self.jitter_s == 0 and self.bandwidth == math.inf

    @property
    def window_bytes(self) -> int:
        """What one connection may have under way: the queue, and what fits on the wire."""
        if self.is_plain:
            return self.queue_bytes
        on_the_wire = self.bandwidth * (self.delay_s + self.jitter_s) / 8
        return self.queue_bytes + int(min(on_the_wire, _UNLIMITED_WINDOW_BYTES))

    def transfer_s(self, nbytes: int) -> float:
        """How long so many bytes keep the link busy."""
        return nbytes * 8 / self.bandwidth


class LinkSchedule:
    """Gives each piece the time at which it arrives::

    admitted ── waits until the link is free ── transfer: 8 · bytes / bandwidth ── delay ── jitter ── arrives
                └────────── the link is busy with one piece at a time ────────┘
    """

    def __init__(self, link: EmulatedLink, seed: int = 0) -> None:
        self.link = link
        """May be replaced at any time; what was admitted keeps its times."""
        self._random = random.Random(seed)
        self._free_at = -math.inf

    def admit(self, nbytes: int, now: float) -> float:
        """A piece of so many bytes is there at `now`, in seconds; when does its last byte arrive?"""
        self._free_at = max(now, self._free_at) + self.link.transfer_s(nbytes)
        return self._free_at + self.link.delay_s + self.link.jitter_s * self._random.random()
