"""Streams that leave the p2p daemons aside, where two peers can reach each other by plain TCP.

A frame over libp2p passes through two daemons, one on each side: four more process switches, which on a fast
link is most of what a token's step costs on its way. So the peer that serves a stream offers, over it,
another way: a port of its own, a ticket that admits one connection, and a key for each direction. libp2p has
authenticated both ends of the stream and encrypts what passes there, so a peer that shows the ticket, and
knows the keys, is the peer that the daemon has named.

::

    opener                                          server
      │ ── libp2p stream ─────────────────────────────▶ │
      │ ◀──────────────────────────── port, ticket, keys │
      │ ══ TCP ══ ticket ═════════════════════════════▶ │   in the clear: it is good for one connection
      │ ◀════════════════════════════ sealed: "welcome" │
      │ ── libp2p stream ── "direct" or "stay" ────────▶ │   and from here on one of the two is used

Frames are sealed with AES-256-GCM (NIST SP 800-38D), numbered by their nonce, so that none can be read,
changed, left out, repeated or moved. Where the port cannot be reached (a firewall, a relay), the libp2p
stream itself is used, and that peer is not tried again for a while (`direct_tries`). Connections that have
not shown a ticket are few, and shared out among the hosts that they come from (`entrance`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swarmkit.errors import PeerError, ProtocolError, SwarmkitError
from swarmkit.net.hivemind.direct_tries import DirectOutcome
from swarmkit.net.hivemind.entrance import Entrance
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.seam import MAX_FRAME_BYTES, Buffer
from swarmkit.net.transport.shares import Holder, host_of

logger = logging.getLogger(__name__)

_SECRET_BYTES = 32
_TAG_BYTES = 16
_WELCOME = b""
_TICKET_LIFETIME_S = 10.0
MOST_STRANGERS = 64
"""Connections that have not shown a ticket yet."""
_BACKLOG = 1024
_ACCEPTED_PER_S, _ACCEPTED_AT_ONCE = 500.0, 128.0
_ACCEPT_AGAIN_S = 1.0
SILENCE_S = 60.0
"""How long a peer's machine may be silent before a connection ends, where no setting says otherwise."""
_PROBES = 3
_MOST_HOSTS = 4
"""How many of the hosts that a peer says it has are tried."""

Secret = Annotated[bytes, msgspec.Meta(min_length=_SECRET_BYTES, max_length=_SECRET_BYTES)]


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The direct connection to the peer that serves a stream."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    ticket: Secret
    to_server: Secret
    to_opener: Secret

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Offer | None:
        """None where it is no offer."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return None


class SealedStream(FrameStream):
    """A `Stream` over a TCP connection; plain until `seal`."""

    def __init__(self, silence_s: float, on_connected: Callable[[FrameStream], None] | None = None) -> None:
        """Args: silence_s: how long the other machine may be silent to the kernel before the stream ends."""
        super().__init__(on_connected=on_connected)
        self.was_connected = False
        """Whether there has been a connection."""
        self._silence_s = silence_s
        self.frame_limit = _SECRET_BYTES  # until both ends know each other nothing longer is due
        self._sealing: AESGCM | None = None
        self._opening: AESGCM | None = None
        self._sent = 0
        self._received = 0

    def seal(self, outgoing: bytes, incoming: bytes) -> None:
        """From now on frames are encrypted: those that go with one key, those that come with the other.

        Raises:
            ProtocolError: bytes have come already that were not sealed.
        """
        if not self.nothing_waits:
            raise ProtocolError("a peer sent more than its ticket before it was welcome", self.peer_id)
        self._sealing, self._opening = AESGCM(outgoing), AESGCM(incoming)
        self.frame_limit = MAX_FRAME_BYTES + _TAG_BYTES
        self.overhead = _TAG_BYTES

    def outgoing(self, parts: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
        if self._sealing is None:
            return parts
        plain = parts[0] if len(parts) == 1 else b"".join(parts)
        nonce = self._sent.to_bytes(12, "big")
        self._sent += 1
        return (self._sealing.encrypt(nonce, plain, None),)

    def incoming(self, frame: bytes) -> bytes:
        if self._opening is None:
            return frame
        nonce = self._received.to_bytes(12, "big")
        self._received += 1
        try:
            return self._opening.decrypt(nonce, frame, None)
        except InvalidTag:
            raise ProtocolError(
                f"what came from peer {self.peer_id} was changed on its way, so the stream was ended",
                self.peer_id,
            ) from None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.was_connected = True
        if (sock := transport.get_extra_info("socket")) is not None:
            _ask_after_peer(sock, self._silence_s)
        if address := transport.get_extra_info("peername"):
            self.host = host_of(str(address[0]))
        super().connection_made(transport)


def _ask_after_peer(sock: socket.socket, silence_s: float) -> None:
    """Have the kernel end a connection whose other machine has been silent for so many seconds.

    A machine that is gone says nothing. Unless told otherwise the kernel asks after two hours.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    quiet_s = max(1, round(silence_s / 2))
    between_s = max(1, round(silence_s / 2 / _PROBES))
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # as macOS calls it
    options = {
        idle: quiet_s,
        "TCP_KEEPINTVL": between_s,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": max(1, round(silence_s * 1000)),  # for bytes that are under way to the machine
    }
    for name, value in options.items():
        if (number := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


@dataclass(eq=False)
class ExpectedStream:
    """A ticket that was given out, and the connection that came with it."""

    offer: Offer
    peer_id: str
    stream: SealedStream | None = None
    taken: bool = False

    def take(self) -> SealedStream:
        """The connection, which is the caller's to end from now on.

        Raises:
            ProtocolError: none has come.
        """
        if self.stream is None:
            raise ProtocolError("the peer says that it came directly, and has not", self.peer_id)
        self.taken = True
        return self.stream


class DirectListener:
    """Takes the connections that were offered. Made by `open`, ended by `close`."""

    def __init__(
        self,
        own: Callable[[FrameStream], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        silence_s: float,
    ) -> None:
        self._silence_s = silence_s
        self._own = own
        self._spawn = spawn
        self._expected: dict[bytes, ExpectedStream] = {}
        self._strangers = Entrance(MOST_STRANGERS)
        self._sockets: list[socket.socket] = []
        self._rate = TokenBucket(_ACCEPTED_PER_S, _ACCEPTED_AT_ONCE)
        self._life = anyio.CancelScope()
        self._loop = asyncio.get_running_loop()
        self.port = 0

    @classmethod
    async def open(
        cls,
        hosts: Sequence[str],
        own: Callable[[FrameStream], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        silence_s: float = SILENCE_S,
    ) -> DirectListener | None:
        """Listen at a free port of these hosts.

        Args:
            own: called with every stream; its owner ends it.
            spawn: runs a coroutine as a task that ends with its owner.
            silence_s: how long a peer's machine may be silent before a connection ends.

        Returns: None where that cannot be: then nothing is offered.
        """
        self = cls(own, spawn, silence_s)
        try:
            for host in hosts:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                sock = socket.create_server((host, self.port), family=family, backlog=_BACKLOG)
                self._sockets.append(sock)
                sock.setblocking(False)
                self.port = sock.getsockname()[1]
        except OSError as error:
            logger.info("no direct streams, as %s cannot be listened at: %s", ", ".join(hosts), error)
            self.close()
            return None
        spawn(self._accept_all())
        return self

    def close(self) -> None:
        """Take no more connections."""
        self._life.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()

    async def _accept_all(self) -> None:
        with self._life:
            async with anyio.create_task_group() as tasks:
                for sock in self._sockets:
                    tasks.start_soon(self._accept_at, sock)

    async def _accept_at(self, sock: socket.socket) -> None:
        """Accept connections at a socket, no faster than at a rate, lest they hold up everything else."""
        for _ in itertools.count():
            try:
                connection, _ = await self._loop.sock_accept(sock)
                await self._loop.connect_accepted_socket(
                    lambda: SealedStream(self._silence_s, self._accept), connection
                )
            except OSError as error:  # such as too many open files
                logger.warning("direct connections cannot be taken now: %s", error)
                await anyio.sleep(_ACCEPT_AGAIN_S)
            if (wait_s := self._rate.take(1)) > 0:
                await anyio.sleep(wait_s)

    @contextlib.contextmanager
    def offer(self, peer_id: str) -> Iterator[ExpectedStream]:
        """A ticket for a peer, good while the `with` block lasts."""
        expected = ExpectedStream(
            Offer(self.port, *(secrets.token_bytes(_SECRET_BYTES) for _ in range(3))), peer_id
        )
        self._expected[expected.offer.ticket] = expected
        try:
            yield expected
        finally:
            self._expected.pop(expected.offer.ticket, None)
            if not expected.taken and expected.stream is not None:
                expected.stream.close()

    def _accept(self, stream: FrameStream) -> None:
        assert isinstance(stream, SealedStream)
        self._own(stream)
        self._spawn(self._admit(stream))

    async def _admit(self, stream: SealedStream) -> None:
        try:
            with self._strangers.holds(stream, Holder(stream.host, "")), anyio.fail_after(_TICKET_LIFETIME_S):
                expected = self._expected.pop(await stream.receive(), None)
            if expected is None:
                raise ProtocolError("the ticket is not known")
            stream.peer_id = expected.peer_id
            stream.seal(expected.offer.to_opener, expected.offer.to_server)
            expected.stream = stream
            await stream.send(_WELCOME)
        except (TimeoutError, SwarmkitError) as error:
            logger.debug("a direct connection was refused: %s", error)
            stream.abort(ProtocolError(f"a direct connection was refused: {error}"))


async def connect_directly(
    peer_id: str,
    offer: Offer,
    hosts: Sequence[str],
    own: Callable[[FrameStream], None],
    timeout: float,
    silence_s: float = SILENCE_S,
) -> tuple[SealedStream | None, DirectOutcome]:
    """Take up an offer at the first of these hosts that answers to it in time, if one does.

    Args:
        own: called with every stream; its owner ends it.
        silence_s: how long the peer's machine may be silent before the connection ends.
    """
    streams = {host: SealedStream(silence_s, own) for host in list(hosts)[:_MOST_HOSTS]}
    attempts = {
        asyncio.ensure_future(_connect(stream, peer_id, offer, host)) for host, stream in streams.items()
    }
    found: SealedStream | None = None
    waiting = attempts
    try:
        with anyio.move_on_after(timeout):
            while waiting and found is None:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                found = next((stream for task in done if (stream := task.result()) is not None), None)
        if found is not None:
            return found, "connected"
        was_reached = any(stream.was_connected for stream in streams.values())
        return None, "turned away" if was_reached else "not reached"
    finally:
        for task in attempts:
            task.cancel()
        for end in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(end, SealedStream) and end is not found:
                end.abort(ProtocolError("given up", peer_id))


async def _connect(stream: SealedStream, peer_id: str, offer: Offer, host: str) -> SealedStream | None:
    stream.peer_id = peer_id
    try:
        await asyncio.get_running_loop().create_connection(lambda: stream, host, offer.port)
        await stream.send(offer.ticket)
        stream.seal(offer.to_server, offer.to_opener)
        if await stream.receive() != _WELCOME:
            raise ProtocolError("no welcome", peer_id)
        return stream
    except (OSError, PeerError) as error:
        logger.debug("peer %s cannot be reached directly at %s: %s", peer_id[-6:], host, error)
        stream.abort(ProtocolError(f"no direct connection: {error}", peer_id))
        return None
    except asyncio.CancelledError:
        stream.abort(ProtocolError("given up", peer_id))
        raise
