"""Both bodies of the transport behind one face, for tests that hold for either."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from swarmkit.errors import PeerUnreachableError
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Handler, Stream, Transport

PeerMaker = Callable[..., Awaitable[Transport]]


class MemoryWorld:
    """Peers in an in-memory network."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.peers: list[Transport] = []

    async def peer(self, **options: Any) -> Transport:
        peer = self.network.transport(**options)
        self.peers.append(peer)
        return peer

    def kill(self, peer: Transport) -> None:
        self.network.kill(peer.peer_id)

    async def close(self) -> None:
        for peer in self.peers:
            await peer.close()


class HivemindWorld:
    """Peers on this machine's loopback; the first one is where the others join."""

    def __init__(self) -> None:
        self.peers: list[Any] = []

    async def peer(self, **options: Any) -> Transport:
        from swarmkit.net.hivemind.transport import HivemindTransport

        initial_peers = self.peers[0].addresses if self.peers else ()
        peer = await HivemindTransport.create(initial_peers=initial_peers, **options)
        self.peers.append(peer)
        return peer

    def kill(self, peer: Transport) -> None:
        peer.kill()  # type: ignore[attr-defined]

    async def close(self) -> None:
        await asyncio.gather(*(peer.close() for peer in self.peers))


class Lent:
    """Peers that are up already and outlive the test: a daemon's start takes longer than most tests."""

    def __init__(self, peers: Sequence[Transport]) -> None:
        self._peers = iter(peers)

    async def peer(self) -> Transport:
        return next(self._peers)


WORLDS: dict[str, Callable[[], MemoryWorld | HivemindWorld]] = {
    "memory": MemoryWorld,
    "hivemind": HivemindWorld,
}


async def echo(stream: Stream) -> None:
    """Send every frame back."""
    while True:
        try:
            frame = await stream.receive()
        except PeerUnreachableError:
            return
        await stream.send(frame)


def collector() -> tuple[Handler, asyncio.Queue[Stream]]:
    """A handler that hands its streams out and keeps them open."""
    streams: asyncio.Queue[Stream] = asyncio.Queue()

    async def handler(stream: Stream) -> None:
        await streams.put(stream)
        await asyncio.Event().wait()

    return handler, streams


def own_tasks() -> set[asyncio.Task[Any]]:
    """The loop's tasks apart from the test's own."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
