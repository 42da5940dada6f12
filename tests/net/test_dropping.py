"""What a host sends on streams that are refused is hardly read, lest it hold up others' messages."""

from __future__ import annotations

from contextlib import suppress

import pytest

from swarmkit.errors import PeerUnreachableError
from swarmkit.net.protocol.messages import SESSION
from swarmkit.net.rpc import server_stream
from swarmkit.net.rpc.server_stream import LINGER_BYTES, ServerStream
from swarmkit.net.rpc.stream_shares import StreamShares

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(30)]

FRAME = bytes(2**20)
FRAMES = 16


class Sender:
    """A stream whose other end has sent some frames in vain."""

    def __init__(self, host: str) -> None:
        self.host = self.peer_id = host
        self.rates = None
        self.left = FRAMES

    async def receive(self) -> bytes:
        if not self.left:
            raise PeerUnreachableError("the peer ended the stream", self.peer_id)
        self.left -= 1
        return FRAME

    async def send(self, *parts: object) -> None: ...

    def on_end(self, call: object) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> StreamShares:
    """A service's streams, while time stands still."""
    monkeypatch.setattr(server_stream, "LINGER_S", 0.05)
    return StreamShares(8, lambda: 0.0)


async def frames_read(shares: StreamShares, host: str) -> int:
    """How many frames are read of a stream that is served no more."""
    sender = Sender(host)
    stream = ServerStream(sender, SESSION, max_payload_bytes=0, message_timeout=5.0)  # type: ignore[arg-type]
    with shares.counted(stream), suppress(PeerUnreachableError):
        await stream.linger()
    stream.close()
    return FRAMES - sender.left


async def test_of_the_first_stream_as_much_is_read_as_may_have_been_under_way(shares: StreamShares) -> None:
    assert await frames_read(shares, "stranger") == LINGER_BYTES // len(FRAME)


async def test_of_those_that_follow_hardly_anything_is_read(shares: StreamShares) -> None:
    await frames_read(shares, "stranger")
    assert sum([await frames_read(shares, "stranger") for _ in range(3)]) <= 1


async def test_another_host_is_read_from_all_the_same(shares: StreamShares) -> None:
    await frames_read(shares, "stranger")
    assert await frames_read(shares, "client") == LINGER_BYTES // len(FRAME)
