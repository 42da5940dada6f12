"""What happened: one record per step, hop by hop, and one event per change of route."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HopTrace:
    """One server's part of one step, in milliseconds.

    `network_ms` is what remains of the time the client waited: both ways, encoding, and event loops. When the
    step came, `ahead` others were there, and the server expected it to wait `expected_wait_ms` for them.
    """

    peer_id: str
    label: str
    start: int
    stop: int
    queue_ms: float
    compute_ms: float
    network_ms: float
    sent_bytes: int = 0
    """Of hidden states, from the client; 0 where the server before handed them on, as it answered."""
    received_bytes: int = 0
    sent_codec: str = "none"
    received_codec: str = "none"
    ahead: int = 0
    expected_wait_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.compute_ms + self.network_ms


@dataclass(frozen=True)
class StepTrace:
    """One step of a session: `tokens` new positions of `rows` rows, from `position` on."""

    position: int
    rows: int
    tokens: int
    total_ms: float
    hops: tuple[HopTrace, ...]
    recovered: bool
    """Whether a server was lost and replaced on the way."""
    recalled: int = 0
    """Tokens before `position` that came with the step, and were not sent because servers had kept them."""


@dataclass(frozen=True)
class RoutePlanned:
    """A session chose the servers it starts with."""

    route: tuple[str, ...]

    def __str__(self) -> str:
        return "route: " + " → ".join(self.route)


@dataclass(frozen=True)
class PeerLost:
    """A server of the route failed, or said that it leaves."""

    peer_id: str
    label: str
    start: int
    stop: int
    reason: str

    def __str__(self) -> str:
        return f"lost {self.label} [{self.start}:{self.stop}]: {self.reason}"


@dataclass(frozen=True)
class PeerReplaced:
    """The blocks of a lost server are served by others, who now hold what it held."""

    peer_id: str
    label: str
    replaced_by: tuple[str, ...]
    """Peer ids."""
    route: tuple[str, ...]
    replayed_tokens: int
    stall_ms: float
    """From noticing the loss to having the output of the replacement."""

    def __str__(self) -> str:
        return (
            f"replaced {self.label} by {' → '.join(self.route)}: "
            f"replayed {self.replayed_tokens} tokens in {self.stall_ms:.0f} ms"
        )


@dataclass(frozen=True)
class Busy:
    """A server is well, but has no room; another one is used, or the first that has some again."""

    peer_id: str
    label: str
    start: int
    stop: int
    reason: str
    retry_after_s: float

    def __str__(self) -> str:
        return (
            f"{self.label} [{self.start}:{self.stop}] is busy for {self.retry_after_s:.1f} s: {self.reason}"
        )


@dataclass(frozen=True)
class Rerouted:
    """The blocks of a busy server are served by others, who now hold what it held."""

    peer_id: str
    label: str
    replaced_by: tuple[str, ...]
    """Peer ids."""
    route: tuple[str, ...]
    replayed_tokens: int
    stall_ms: float

    def __str__(self) -> str:
        return (
            f"went on over {' → '.join(self.route)} in the place of {self.label}: "
            f"replayed {self.replayed_tokens} tokens in {self.stall_ms:.0f} ms"
        )


@dataclass(frozen=True)
class Waiting:
    """Nobody serves some blocks, or all who do have failed lately, or are busy; the session waits."""

    missing: tuple[tuple[int, int], ...]
    seconds: float
    busy: bool = False

    def __str__(self) -> str:
        named = ", ".join(f"{low}:{high}" for low, high in self.missing)
        if self.busy:
            return f"all servers of blocks {named} are busy; waiting up to {self.seconds:.0f} s for room"
        return f"nobody serves blocks {named}; waiting up to {self.seconds:.0f} s for a newcomer"


SessionEvent = RoutePlanned | PeerLost | PeerReplaced | Busy | Rerouted | Waiting
