"""How many tokens each client may have computed in a minute, if the owner of a server sets a limit."""

from __future__ import annotations

from collections.abc import Callable

from swarmkit.net.rpc.faults import Refusal

_MINUTE_S = 60.0
_LONGEST_WAIT_S = 3600.0
"""That a client is told."""
_KEPT_CLIENTS = 256
"""As long as they are so few, it is not looked for clients that can be forgotten."""
_ROUNDING = 1e-6


class ClientQuota:
    """Counts tokens (rows x tokens) by client, as a bucket that empties at a steady rate (a leaky bucket).

    ::

        level of a client  =  max(0, level - limit * seconds / 60) + tokens

    A client whose bucket has room for them may have all tokens of a minute at once. A request of more tokens
    than that is taken when the bucket is empty, and the client then waits for as long as it should have.
    Used by the event loop's thread only.

    Attributes:
        per_minute: the limit; None: there is none. May be replaced at any time.
    """

    def __init__(self, clock: Callable[[], float], per_minute: int | None = None) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}
        """By client: how full its bucket was, and when."""
        self._most_clients = _KEPT_CLIENTS

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, client: str, tokens: int) -> None:
        """Count tokens that are to be computed for a client.

        Raises:
            Refusal: they are more than the client may have now; it says when they will not be.
        """
        if self.per_minute is None:
            return
        now, rate = self._clock(), self.per_minute / _MINUTE_S
        level = self._level(client, now, rate)
        excess = level + min(tokens, self.per_minute) - self.per_minute
        if excess > _ROUNDING:
            wait_s = min(excess / rate, _LONGEST_WAIT_S)
            raise Refusal(
                "busy",
                f"this server computes {self.per_minute} tokens a minute for each client, and these would be "
                f"more; come back in {wait_s:.0f} s, or try another server",
                wait_s,
            )
        self._levels[client] = level + tokens, now
        if len(self._levels) > self._most_clients:
            self._forget(now, rate)

    def _level(self, client: str, now: float, rate: float) -> float:
        level, at = self._levels.get(client, (0.0, now))
        return max(0.0, level - (now - at) * rate)

    def _forget(self, now: float, rate: float) -> None:
        """Forget the clients whose buckets are empty."""
        self._levels = {one: held for one, held in self._levels.items() if self._level(one, now, rate) > 0}
        self._most_clients = max(_KEPT_CLIENTS, 2 * len(self._levels))
