"""Pauses that the person asks for, and when each of them ends. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Literal

from msgspec import Meta, Struct

UNTIL_AWAY_S = 30 * 60.0
"""How long the person must be away until an `away` pause ends."""
_LONGEST_S = 366 * 86400.0
_MORNING_HOUR = 6

Until = Literal["seconds", "tomorrow", "away", "resumed"]
Haste = Literal["polite", "prompt", "now"]
"""How soon the node has gone: `polite` gives sessions their time to move away, `prompt` has stopped computing
within a second and given all memory back within three, `now` ends it at once."""


class PauseRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the person asks for.

    `until` is one of: `seconds` (with `seconds`), `tomorrow` (6 o'clock in the morning of the next day),
    `away` (nobody has used the computer for 30 minutes), or `resumed` (until asked to go on).
    """

    until: Until = "resumed"
    seconds: Annotated[float, Meta(gt=0, le=_LONGEST_S)] | None = None
    haste: Haste = "prompt"


class Pause(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pause that holds.

    Attributes:
        ends_at: Unix time at which it ends by itself; None: at no time that is known.
    """

    until: Until
    ends_at: float | None = None
    haste: Haste = "prompt"

    @classmethod
    def begin(cls, request: PauseRequest, now: datetime) -> Pause:
        """Return the pause that was asked for at a time with a time zone."""
        ends = None
        if request.until == "seconds":
            ends = now + timedelta(seconds=request.seconds or 3600.0)
        elif request.until == "tomorrow":
            ends = next_morning(now)
        return cls(until=request.until, ends_at=ends.timestamp() if ends else None, haste=request.haste)

    def is_over(self, now: float, away_s: float | None) -> bool:
        """Whether it has ended.

        Args:
            now: Unix time.
            away_s: for how long nobody has used the computer; None: it is not known.
        """
        if self.until == "away":
            return away_s is not None and away_s >= UNTIL_AWAY_S
        return self.ends_at is not None and now >= self.ends_at

    def after_clock_was_set(self, seconds: float) -> Pause:
        """Return the pause with the same time left after the computer's clock was set forward by so much."""
        if self.until != "seconds" or self.ends_at is None:
            return self  # a morning is a time of the clock, however it was set
        return Pause(until=self.until, ends_at=self.ends_at + seconds, haste=self.haste)


def next_morning(now: datetime) -> datetime:
    """Return 6 o'clock of the next day."""
    day = (now + timedelta(days=1)).replace(
        hour=_MORNING_HOUR, minute=0, second=0, microsecond=0, tzinfo=None
    )
    # The time zone's offset may differ by then; a naive time is read as the computer's local one.
    return day.astimezone() if now.tzinfo is None or _is_local(now) else day.replace(tzinfo=now.tzinfo)


def _is_local(now: datetime) -> bool:
    return now.replace(tzinfo=None).astimezone().utcoffset() == now.utcoffset()
