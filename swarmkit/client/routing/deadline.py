"""When has a peer been silent for too long? A deadline that follows the steps seen so far.

Fixed time-outs are wrong twice: a minute is an eternity in a chat, and a second is too short for a long
prompt on a slow machine. As TCP does for its retransmissions (RFC 6298), the smoothed time and its variation
are kept for each peer, separately for single tokens and, per token, for longer steps; the deadline is a
multiple well above them.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmkit.client.routing.claims import Shown
from swarmkit.ewma import Ewma

_GAIN = 0.125
_VARIATIONS = 4.0
_MAX_BACKOFF = 64.0
_UNMEASURED_S = 5.0
"""Added to what a peer claims about itself while nothing was measured: it may be busy, or warming up."""


@dataclass(frozen=True)
class DeadlinePolicy:
    """How long to wait.

    Attributes:
        first_s: at most, before anything was measured.
        min_s: never below this.
        factor: times the usual time.
    """

    first_s: float
    min_s: float
    factor: float


class StepTimes:
    """How long the steps of one peer take, from sending to having the answer, in seconds."""

    def __init__(self, claimed_rate: float = 0.0) -> None:
        """Args: claimed_rate: tokens per second that the peer announces; 0 = unknown."""
        self._claimed_rate = claimed_rate
        self._single: Ewma | None = None
        self._per_token: Ewma | None = None
        self._backoff = 1.0
        self.blocks = 0
        """That the latest session there has."""
        self.way_s = 0.0
        """Seconds that it took to open a session there, which computes nothing."""

    @property
    def is_measured(self) -> bool:
        """Whether any step was seen."""
        return self._single is not None or self._per_token is not None

    @property
    def shown(self) -> Shown | None:
        """What the peer has shown of its speed, if anything."""
        seen = self._single or self._per_token
        return Shown(seen.mean, self.blocks, self.way_s) if seen else None

    @property
    def round_trip_s(self) -> float | None:
        """The usual time of a one-token step, or None if none was seen."""
        return self._single.mean if self._single else None

    def usual_s(self, tokens: int) -> float | None:
        """The usual time of a step of `tokens`, or None if none of its kind was seen."""
        if tokens <= 1:
            return self.round_trip_s
        return tokens * self._per_token.mean if self._per_token else None

    def observe(self, tokens: int, seconds: float) -> None:
        """Note a step of `tokens` (batch x tokens)."""
        self._backoff = 1.0
        if tokens <= 1:
            if self._single is None:
                self._single = _ewma(seconds)
            self._single.observe(seconds)
        else:
            if self._per_token is None:
                self._per_token = _ewma(seconds / tokens)
            self._per_token.observe(seconds / tokens)

    def timed_out(self) -> None:
        """Note that a deadline passed: the next is twice as long, for a peer that only became slower."""
        self._backoff = min(2 * self._backoff, _MAX_BACKOFF)

    def deadline_s(self, tokens: int, policy: DeadlinePolicy) -> float:
        """Seconds to wait for a step of `tokens`."""
        single, per_token = self._single, self._per_token
        if single is None and per_token is None:
            if not self._claimed_rate:
                return self._backoff * policy.first_s
            claimed = _UNMEASURED_S + policy.factor * tokens / self._claimed_rate
            return max(policy.min_s, self._backoff * min(policy.first_s, claimed))
        if tokens <= 1 and single is not None:
            usual = _upper(single)
        else:
            # One token cannot take longer than one token by itself, whichever of the two was measured.
            usual = _upper(single) + tokens * _upper(per_token or single)
        return max(policy.min_s, self._backoff * policy.factor * usual)


def _ewma(first: float) -> Ewma:
    return Ewma(first, first / 2, _GAIN)


def _upper(times: Ewma | None) -> float:
    return times.mean + _VARIATIONS * times.deviation if times else 0.0
