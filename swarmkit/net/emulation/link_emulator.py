"""A link of a chosen quality before a listening port: a TCP relay with delay, jitter, bandwidth and cuts.

Nothing of the machine's network is changed: a peer that is to be met over the link *announces* the relay's
address instead of its own (`over_hivemind(announce=[link.address])`), so that all other peers dial the relay.

**What others see.** Between a peer with a link and one without, a message arrives

    delay + 8 · bytes / bandwidth            (+ up to jitter)

later than it would, and a round trip of small messages takes `inbound.delay_s + outbound.delay_s` longer.
Two peers that both have a link meet over one of the two, that of the peer that was dialled, so that a pair of
peers is never further apart than one link. A new connection waits for one more round trip, as for TCP's
handshake. What TCP itself does over a long way (slow start, losses) is not emulated: a link is like a
connection that has been in use for a while.

**What it adds by itself.** A piece passes one event loop more, twice a round trip: `emulator_ms` in the
result of `swarmkit bench distance` is what that takes. What is delayed leaves up to a millisecond late and
never early, because that is how fine an event loop's timers are.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import socket
import struct
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import cast

from swarmkit.errors import TransportError, UsageError
from swarmkit.net.emulation.link_schedule import EmulatedLink, LinkSchedule

logger = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024
_CALL_TIMEOUT_S = 10.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 s


class LinkEmulator:
    """A relay in front of `target`. Made by `open` on an event loop, ended by `close` on the same one.

    `inbound` is the direction towards the target. What changes the link (`change`, `drop`, `refuse`,
    `silence`, `heal`) may be called from any thread, and has been done when it returns.
    """

    def __init__(
        self,
        target: tuple[str, int],
        inbound: EmulatedLink,
        outbound: EmulatedLink | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Not for use: see `open`."""
        self.target = target
        """Where it passes connections on to: host and port."""
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._lanes = (_Lane(inbound, 2 * seed), _Lane(outbound or inbound, 2 * seed + 1))
        self._connections: set[_Connection] = set()
        self._dialling: set[asyncio.Task[None]] = set()
        self._refused_until = -math.inf
        self._closed = False
        self.host = ""
        self.port = 0

    @classmethod
    async def open(
        cls,
        target: tuple[str, int],
        inbound: EmulatedLink,
        outbound: EmulatedLink | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int = 0,
    ) -> LinkEmulator:
        """Listen at `host` and `port` (0 = any free one) for connections that are passed on to `target`.

        Args:
            target: host and port; nothing needs to listen there before the first connection comes.
            inbound, outbound: the quality towards the target and back; the same in both if one is given.
            seed: of the jitter.

        Raises:
            TransportError: the port is in use.
        """
        self = cls(target, inbound, outbound, seed=seed)
        try:
            self._server = await self._loop.create_server(self._accepted, host, port)
        except OSError as error:
            raise TransportError(f"a link cannot listen at {host}:{port}: {error}; choose another") from error
        self.host, self.port = self._server.sockets[0].getsockname()[:2]
        return self

    @property
    def address(self) -> str:
        """The multiaddress to announce."""
        return f"/{'ip6' if ':' in self.host else 'ip4'}/{self.host}/tcp/{self.port}"

    @property
    def inbound_bytes(self) -> int:
        """What has arrived at the target so far."""
        return self._lanes[0].delivered_bytes

    @property
    def outbound_bytes(self) -> int:
        """What the target has sent, as far as it has arrived."""
        return self._lanes[1].delivered_bytes

    @property
    def num_connections(self) -> int:
        """How many connections pass through now."""
        return len(self._connections)

    # ------------------------------------------------------------------ programming it

    def change(self, *, inbound: EmulatedLink | None = None, outbound: EmulatedLink | None = None) -> None:
        """Have another quality from now on; what is under way arrives as it would have, and first."""
        self._on_loop(lambda: self._change(inbound, outbound))

    def drop(self) -> None:
        """End all connections at once; what is under way is lost. New connections are welcome."""
        self._on_loop(self._drop)

    def refuse(self, seconds: float = math.inf) -> None:
        """End all connections, and any new one as soon as it is made, for so long or until `heal`."""
        self._on_loop(lambda: self._refuse(seconds))

    def silence(self, *, inbound: bool = True, outbound: bool = True) -> None:
        """Keep connections open and deliver nothing, not even their end, until `heal`: a black hole."""
        self._on_loop(lambda: self._silence(inbound, outbound))

    def heal(self) -> None:
        """End `refuse` and `silence`; what was held arrives."""
        self._on_loop(self._heal)

    async def close(self) -> None:
        """End the relay and all its connections. May be called twice."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for task in self._dialling:
            task.cancel()
        self._drop()
        if self._dialling:
            await asyncio.wait(self._dialling)
        await asyncio.sleep(0)  # the sockets of what was dropped are closed by the loop's next turn

    async def __aenter__(self) -> LinkEmulator:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------ doing, on the loop's thread

    def _on_loop(self, act: Callable[[], None]) -> None:
        if self._closed:
            raise UsageError("this link was closed; open a new one")
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            act()
            return
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            try:
                act()
            except BaseException as error:  # noqa: BLE001 - raised again where it was called
                done.set_exception(error)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result(_CALL_TIMEOUT_S)

    def _change(self, inbound: EmulatedLink | None, outbound: EmulatedLink | None) -> None:
        for lane, link in zip(self._lanes, (inbound, outbound), strict=True):
            if link is not None:
                lane.schedule.link = link
        self._regulate()

    def _drop(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    def _refuse(self, seconds: float) -> None:
        self._refused_until = self._loop.time() + seconds
        self._drop()

    def _silence(self, inbound: bool, outbound: bool) -> None:
        self._lanes[0].silent, self._lanes[1].silent = inbound, outbound
        self._regulate()

    def _heal(self) -> None:
        self._refused_until = -math.inf
        self._silence(False, False)

    def _regulate(self) -> None:
        for connection in list(self._connections):
            connection.regulate()

    def _accepted(self) -> _End:
        connection = _Connection(self._loop, self._lanes, self._ready_to_dial, self._connections.discard)
        return connection.near

    def _ready_to_dial(self, connection: _Connection) -> None:
        if self._closed or self._loop.time() < self._refused_until:
            connection.reset()
            return
        self._connections.add(connection)
        task = self._loop.create_task(self._dial(connection), name="swarmkit-link-dial")
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _dial(self, connection: _Connection) -> None:
        try:
            await asyncio.sleep(sum(lane.schedule.link.delay_s for lane in self._lanes))
            await self._loop.create_connection(lambda: connection.far, *self.target)
        except OSError as error:
            logger.debug("nothing listens behind the link at %s: %s", self.target, error)
            connection.reset()
        except BaseException:
            connection.reset()
            raise


class _Lane:
    """What all connections share in one direction."""

    def __init__(self, link: EmulatedLink, seed: int) -> None:
        self.schedule = LinkSchedule(link, seed)
        self.silent = False
        self.delivered_bytes = 0


class _Connection:
    """Two sockets, and a flow for each direction between them."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        lanes: tuple[_Lane, _Lane],
        on_made: Callable[[_Connection], None],
        on_end: Callable[[_Connection], None],
    ) -> None:
        self._loop = loop
        self._on_made = on_made
        self._on_end = on_end
        self._num_made = 0
        self._ended = False
        self.near, self.far = _End(self), _End(self)
        self.flows = (
            _Flow(loop, lanes[0], self.near, self.far, self._half_ended),
            _Flow(loop, lanes[1], self.far, self.near, self._half_ended),
        )

    def made(self, end: _End) -> None:
        """One of the sockets is there."""
        self._num_made += 1
        if self._ended:  # in the meantime
            end.reset()
        elif end is self.near:
            self._on_made(self)
        self._loop.call_soon(self.regulate)  # not yet: asyncio begins to read after this, whatever it is told

    def lost(self, end: _End) -> None:
        """One of the sockets has ended; the other shall, once it has got what was sent to it."""
        for flow in self.flows:
            if flow.source is end:
                flow.finish()
            else:
                flow.forget()
        if self._num_made == 2 and not (self.near.is_open or self.far.is_open):
            self._end()

    def reset(self) -> None:
        """End both sockets at once."""
        for flow in self.flows:
            flow.forget()
        for end in (self.near, self.far):
            end.reset()
        self._end()

    def regulate(self) -> None:
        for flow in self.flows:
            flow.pump()

    def _half_ended(self) -> None:
        if all(flow.has_ended for flow in self.flows):
            for end in (self.near, self.far):
                end.close()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(self)


class _End(asyncio.BufferedProtocol):
    """One socket of a relayed connection."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._reading = True
        self.transport: asyncio.Transport | None = None
        self.out: _Flow
        """Where what is read here goes."""
        self.into: _Flow
        """Where what is written here comes from."""

    @property
    def is_open(self) -> bool:
        return self.transport is not None

    def read(self, wanted: bool) -> None:
        """Begin or cease to read."""
        if self.transport is None or wanted == self._reading or self.transport.is_closing():
            return
        self._reading = wanted
        if wanted:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def close(self) -> None:
        """End the socket after what was written to it."""
        if self.transport is not None:
            self.transport.close()

    def reset(self) -> None:
        """End the socket at once, and let the other side of it know that it was not meant to."""
        if self.transport is None:
            return
        with contextlib.suppress(OSError):
            raw = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._connection.made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.out.take(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:
        self.out.end_half()
        return True  # the other direction may go on

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._connection.lost(self)

    def pause_writing(self) -> None:
        self.into.stuck = True
        self.into.pump()

    def resume_writing(self) -> None:
        self.into.stuck = False
        self.into.pump()


_EOF = b""
"""In a flow's queue: the sender has ended its half of the connection."""


class _Flow:
    """One direction of one connection: pieces that wait for their time, in order.

    The sender is no longer read from while more than the link's window is under way, so that it is held up
    as it would be by a full queue.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        lane: _Lane,
        source: _End,
        sink: _End,
        on_end: Callable[[], None],
    ) -> None:
        self.source = source
        self.has_ended = False
        """The receiver knows that nothing more comes."""
        self.stuck = False
        """The receiver takes nothing now."""
        self._loop = loop
        self._lane = lane
        self._sink = sink
        self._on_end = on_end
        self._queue: deque[tuple[float, bytes | None]] = deque()  # None = close
        self._queued_bytes = 0
        self._last_arrival = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        source.out = sink.into = self

    def take(self, data: bytes) -> None:
        """The sender has sent this."""
        if self._lane.schedule.link.is_plain and not self._queue and self._may_deliver:
            self._deliver(data)  # the short way, without a timer
            return
        self._queued_bytes += len(data)
        self._append(data, self._lane.schedule.admit(len(data), self._loop.time()))

    def end_half(self) -> None:
        """The sender sends no more."""
        self._append(_EOF, self._lane.schedule.admit(0, self._loop.time()))

    def finish(self) -> None:
        """The sender has gone: so shall the receiver's socket, after what is under way."""
        self._append(None, self._lane.schedule.admit(0, self._loop.time()))

    def forget(self) -> None:
        """The receiver is gone."""
        self._queue.clear()
        self._queued_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pump(self) -> None:
        """Deliver what is due, come back for the rest, and let the sender send or wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and self._may_deliver:
            arrival, data = self._queue[0]
            if arrival > self._loop.time():
                self._timer = self._loop.call_at(arrival, self.pump)
                break
            self._queue.popleft()
            self._queued_bytes -= len(data or b"")
            self._deliver(data)
        self.source.read(self._may_read)

    def _append(self, data: bytes | None, arrival: float) -> None:
        # jitter and a link that was changed must not let a piece overtake another
        self._last_arrival = max(self._last_arrival, arrival)
        self._queue.append((self._last_arrival, data))
        if self._timer is None:
            self.pump()
        else:
            self.source.read(self._may_read)

    @property
    def _may_deliver(self) -> bool:
        return not self.stuck and not self._lane.silent and self._sink.is_open

    @property
    def _may_read(self) -> bool:
        roomy = self._queued_bytes <= self._lane.schedule.link.window_bytes
        return roomy and not self._lane.silent and self._sink.is_open

    def _deliver(self, data: bytes | None) -> None:
        transport = self._sink.transport
        if transport is None or transport.is_closing():
            return
        if data is None:
            transport.close()
        elif data == _EOF:
            transport.write_eof()
            self.has_ended = True
            self._on_end()
        else:
            self._lane.delivered_bytes += len(data)
            transport.write(data)
