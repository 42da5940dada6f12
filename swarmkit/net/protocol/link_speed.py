"""How many bytes per second does a way between two peers carry? Measured where the bytes arrive.

Every message says when it was sent, by its sender's clock. The two clocks are not set alike, but a small
message tells what lies between them, transfer apart; a large one is late by what its bytes take::

    sender     sent_at                                  (its clock)
    receiver      ├─ offset + delay ─┼── bytes / speed ──┤ arrived_at
                  └── small messages: the least seen     └── behind a message that arrived later: from there

A message that had arrived before it was received tells nothing: the receiver must have waited for most of it.
"""

from __future__ import annotations

import math
from collections import deque

SMALL_BYTES = 2 * 1024
"""Up to here a message tells the delay; where the speed is known already, up to `LARGE_BYTES`."""
LARGE_BYTES = 16 * 1024
"""From here on it tells the speed."""
_BASE_LASTS_S = 60.0
"""Clocks drift: by 3 ms a minute, if they are bad."""
_NOISE_S = 1e-3
"""What a busy event loop adds; no less is believed to be the link's doing."""
_LEAST_S = 1e-4
_KEPT = 4
_ENOUGH = 2


class LinkSpeed:
    """One direction of one connection. Times are seconds; the two clocks need not agree."""

    def __init__(self) -> None:
        self._base_s = math.inf
        self._base_from = -math.inf
        self._last_arrived_at = -math.inf
        self._rates: deque[float] = deque(maxlen=_KEPT)

    @property
    def bytes_per_s(self) -> float | None:
        """None as long as too little was seen.

        Whatever disturbs a measurement makes the link look slow, so the best of the latest ones counts, and
        one alone is not enough.
        """
        return max(self._rates) if len(self._rates) >= _ENOUGH else None

    def observe(
        self, nbytes: int, sent_at: float, arrived_at: float, waiting_from: float = -math.inf
    ) -> None:
        """Note a message.

        Args:
            sent_at: by the sender's clock.
            arrived_at: when all of it had been read, by the receiver's clock.
            waiting_from: since when the receiver waited for it.
        """
        late_s = arrived_at - sent_at
        speed = self.bytes_per_s
        if nbytes <= SMALL_BYTES or (speed is not None and nbytes < LARGE_BYTES):
            late_s -= nbytes / speed if speed is not None else 0.0
            if late_s <= self._base_s or arrived_at - self._base_from > _BASE_LASTS_S:
                self._base_s, self._base_from = late_s, arrived_at
        elif nbytes >= LARGE_BYTES and arrived_at - self._base_from <= _BASE_LASTS_S:
            begun_at = max(sent_at + self._base_s, self._last_arrived_at)
            if arrived_at - waiting_from >= waiting_from - begun_at:
                self._rates.append(nbytes / max(arrived_at - begun_at - _NOISE_S, _LEAST_S))
        self._last_arrived_at = arrived_at
