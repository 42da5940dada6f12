"""What a local swarm is made of: members of any kind, each a peer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from swarmkit.net.connect import TransportFactory


class Member(Protocol):
    """A peer that a local swarm starts and ends: a server, a trainer, or one that lies on purpose."""

    @property
    def addresses(self) -> Sequence[str]:
        """Where other peers can dial it; none before it has started."""

    def start(self) -> object:
        """Take part in the swarm; returns when it does. Called once."""

    def stop(self, drain_timeout: float | None = None) -> None:
        """Leave cleanly, within about `drain_timeout` seconds if given. May be called after `kill`, too."""

    def kill(self) -> None:
        """End as a crashed machine would."""


class LocalServer(Member, Protocol):
    """A member that serves blocks, in this process or in one of its own."""

    peer_id: str

    @property
    def alive(self) -> bool:
        """Whether it has started and has not ended."""

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks [a, b) that it serves."""


@dataclass(frozen=True)
class Place:
    """What a new member of a local swarm is given.

    Attributes:
        name: how it is called in the swarm.
        transport: how to reach the swarm from this process.
        initial_peers: addresses for a member in another process; none in an in-memory swarm.
        port, announce: where such a member listens, and which addresses others shall dial instead.
    """

    name: str
    transport: TransportFactory
    initial_peers: tuple[str, ...] = ()
    port: int = 0
    announce: tuple[str, ...] = ()
