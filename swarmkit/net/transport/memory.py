"""The transport's in-memory twin: a network in one event loop, whose faults are programmed.

It keeps the contract of the real one, including what tests must not get for free: bounded queues, frames
that are still under way, peers that die in the middle of a conversation, and peers that fall silent while
their connection stays up. What is random is drawn from the network's own seeded generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from swarmkit.clock import system_date
from swarmkit.errors import (
    NoContactError,
    NotServedError,
    PeerTimeoutError,
    PeerUnreachableError,
    SwarmkitError,
    TransportError,
    UsageError,
)
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.limits import checked_records, frame_too_large
from swarmkit.net.transport.members import roles_of_request
from swarmkit.net.transport.peer_lists import PeerLists, TableLists
from swarmkit.net.transport.rates import Rates
from swarmkit.net.transport.seam import (
    MAX_FRAME_BYTES,
    Buffer,
    Handler,
    RecordCheck,
    Stream,
    Transport,
    peer_of,
    service_id,
)
from swarmkit.net.transport.swarm_key import SwarmKey, admit_opener, prove_to_server

logger = logging.getLogger(__name__)

_QUEUE_BYTES = 1024 * 1024
_FRAME_COST = 64  # what even an empty frame counts


@dataclass
class MemoryLink:
    """How frames fare between two peers.

    Attributes:
        delay: seconds from one end to the other.
        bandwidth: bit/s in each direction, shared by all streams.
        fail_rate: probability with which a send ends its stream.
        cut: nothing gets through.
    """

    delay: float = 0.0
    bandwidth: float = math.inf
    fail_rate: float = 0.0
    cut: bool = False


class MemoryNetwork:
    """The world in which memory transports meet. Everything in it runs in one event loop."""

    def __init__(
        self,
        *,
        seed: int = 0,
        clock: Callable[[], float] = system_date,
        queue_bytes: int = _QUEUE_BYTES,
    ) -> None:
        """Args:
        seed: of what is random.
        clock: tells the Unix time, for the expiry of records.
        queue_bytes: so many may be under way to one reader before the sender has to wait.
        """
        self.clock = clock
        self.queue_bytes = queue_bytes
        self.hosts: dict[str, str] = {}
        """Where peers come from, by peer id, as far as a test says so."""
        self._random = random.Random(seed)
        self._peers: dict[str, MemoryTransport] = {}
        self._hung: set[str] = set()
        self._resume_waiters: list[asyncio.Future[None]] = []
        self._links: dict[frozenset[str], MemoryLink] = {}
        self._free_at: dict[tuple[str, str], float] = {}
        """When all that was sent from one peer to another is on its way (loop time)."""
        self._table: dict[str, dict[str, tuple[float, bytes]]] = {}

    def transport(
        self,
        identity: Identity | None = None,
        record_check: RecordCheck | None = None,
        swarm_key: SwarmKey | None = None,
    ) -> MemoryTransport:
        """A new peer.

        Args: swarm_key: of the private swarm that it belongs to.

        Raises:
            UsageError: a peer of this identity is there already.
        """
        transport = MemoryTransport(self, identity or Identity(), record_check, swarm_key)
        if transport.peer_id in self._peers:
            raise UsageError(f"peer {transport.peer_id} is in this network already; close it first")
        self._peers[transport.peer_id] = transport
        return transport

    @property
    def peers(self) -> frozenset[str]:
        """The ids of all peers that are here."""
        return frozenset(self._peers)

    def seed(self, seed: int) -> None:
        """Begin again with what is random."""
        self._random.seed(seed)

    def kill(self, peer_id: str) -> None:
        """The peer vanishes without a word: its streams end at both ends, its tasks are cancelled."""
        self._peer(peer_id).kill()

    def hang(self, peer_id: str) -> None:
        """The peer falls silent, but its connections stay up: frames from and to it wait for `resume`."""
        self._hung.add(self._peer(peer_id).peer_id)

    def resume(self, peer_id: str) -> None:
        """End a `hang`; what was held arrives."""
        self._hung.discard(peer_id)
        for peer in self._peers.values():
            peer._wake_streams()
        waiters, self._resume_waiters = self._resume_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def set_link(
        self,
        a: str,
        b: str,
        *,
        delay: float | None = None,
        bandwidth: float | None = None,
        fail_rate: float | None = None,
    ) -> None:
        """Set how frames fare between two peers, in both directions; what is not given stays."""
        link = self._links.setdefault(frozenset((a, b)), MemoryLink())
        link.delay = link.delay if delay is None else delay
        link.bandwidth = link.bandwidth if bandwidth is None else bandwidth
        link.fail_rate = link.fail_rate if fail_rate is None else fail_rate

    def cut(self, a: str, b: str) -> None:
        """Two peers lose each other: their streams end, new ones cannot be opened."""
        self._links.setdefault(frozenset((a, b)), MemoryLink()).cut = True
        for one, other in ((a, b), (b, a)):
            if one in self._peers:
                self._peers[one]._end_streams_with(other)

    def heal(self, a: str, b: str) -> None:
        """End a `cut`."""
        self._links.setdefault(frozenset((a, b)), MemoryLink()).cut = False

    def link(self, a: str, b: str) -> MemoryLink:
        """How frames fare between two peers now."""
        return self._links.get(frozenset((a, b)), MemoryLink())

    def lose(self, key: str, subkey: str) -> None:
        """Those who kept a record are gone, and with them the record."""
        self._table.get(key, {}).pop(subkey, None)

    def endpoints(self, peer_id: str) -> frozenset[str]:
        """The names of the streams that a peer serves."""
        return frozenset(self._peer(peer_id)._handlers)

    def is_silent(self, a: str, b: str) -> bool:
        """Whether nothing passes between two peers because one of them hangs."""
        return a in self._hung or b in self._hung

    def _is_isolated(self, peer_id: str) -> bool:
        """Whether there are other peers, and none of them can be reached from this one."""
        others = [other for other in self._peers if other != peer_id]
        return bool(others) and all(
            self.link(peer_id, other).cut or self.is_silent(peer_id, other) for other in others
        )

    def _peer(self, peer_id: str) -> MemoryTransport:
        try:
            return self._peers[peer_id]
        except KeyError:
            raise UsageError(f"no peer {peer_id} is in this network (any more)") from None

    async def _next_resume(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._resume_waiters.append(waiter)
        await waiter

    def _leave(self, peer_id: str) -> None:
        self._peers.pop(peer_id, None)
        self._hung.discard(peer_id)

    def _arrival(self, a: str, b: str, nbytes: int) -> float:
        """When a frame that is sent now is there (loop time)."""
        link, now = self.link(a, b), asyncio.get_running_loop().time()
        if link.bandwidth == math.inf:
            return now + link.delay
        free_at = max(now, self._free_at.get((a, b), now)) + nbytes * 8 / link.bandwidth
        self._free_at[a, b] = free_at
        return free_at + link.delay

    def _fails(self, a: str, b: str) -> bool:
        rate = self.link(a, b).fail_rate
        return rate > 0 and self._random.random() < rate

    def _keep(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        """Whether a peer that is there took the record (the peers' memory is one dictionary here)."""
        if expires_at <= self.clock() or not any(
            peer._accepts(key, subkey, value, expires_at) for peer in self._peers.values()
        ):
            return False
        entries = self._table.setdefault(key, {})
        if subkey in entries and entries[subkey][0] >= expires_at:
            return False
        entries[subkey] = (expires_at, value)
        return True

    def _held(self, key: str) -> dict[str, tuple[float, bytes]]:
        now = self.clock()
        entries = {s: e for s, e in self._table.pop(key, {}).items() if e[0] > now}
        if entries:
            self._table[key] = entries
        return entries


class MemoryStream(Stream):
    """One end of a conversation."""

    def __init__(self, network: MemoryNetwork, own_id: str, peer_id: str) -> None:
        self._network = network
        self._own_id = own_id
        self._peer_id = peer_id
        self.rates: Rates | None = None
        self.host = network.hosts.get(peer_id, "")
        self._other: MemoryStream = self
        self._frames: deque[tuple[float, bytes]] = deque()  # when each arrives (loop time), and it
        self._queued = 0
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()  # those that wait for room at this end
        self._end: SwarmkitError | None = None
        self._farewell: SwarmkitError | None = None  # arrives behind the last frame
        self._on_end: Callable[[], object] | None = None

    @classmethod
    def pair(cls, network: MemoryNetwork, a: str, b: str) -> tuple[MemoryStream, MemoryStream]:
        """Both ends of a new conversation between two peers."""
        one, other = cls(network, a, b), cls(network, b, a)
        one._other, other._other = other, one
        return one, other

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def send(self, *parts: Buffer) -> None:
        """See `Stream.send`."""
        frame = b"".join(parts)
        size = len(frame)
        if size > MAX_FRAME_BYTES:
            raise frame_too_large(size)
        if (rates := self.rates) is not None:
            rates.traffic.sent_bytes += size
            if (bucket := rates.upload) is not None:
                await rates.wait(bucket, size)
        self._check_sendable()
        if self._network._fails(self._own_id, self._peer_id):
            self.abort(
                PeerUnreachableError(f"the connection to peer {self._peer_id} was lost", self._peer_id)
            )
            self._check_sendable()
        other = self._other
        while other._queued > self._network.queue_bytes:
            await other._wait_for_room()
            self._check_sendable()
        other._queued += size + _FRAME_COST
        other._frames.append((self._network._arrival(self._own_id, self._peer_id, size), frame))
        other._wake_reader()
        if other._queued <= self._network.queue_bytes:
            other._wake_writer()

    async def receive(self) -> bytes:
        """See `Stream.receive`."""
        while True:
            if self._end is not None:
                raise _again(self._end)
            if not self._network.is_silent(self._own_id, self._peer_id):
                if self._frames:
                    remaining = self._frames[0][0] - asyncio.get_running_loop().time()
                    if remaining <= 0:
                        break
                    await self._wait(remaining)
                    continue
                if self._farewell is not None:
                    raise _again(self._farewell)
            await self._wait()
        frame = self._take()
        if (rates := self.rates) is not None:
            rates.traffic.received_bytes += len(frame)
            if (bucket := rates.download) is not None:
                await rates.wait(bucket, len(frame))
        return frame

    def on_end(self, call: Callable[[], object]) -> None:
        """See `Stream.on_end`."""
        self._on_end = call
        self._tell_end()

    def close(self) -> None:
        """See `Stream.close`. What was sent before still arrives."""
        self._finish(PeerUnreachableError("the stream was closed on this side", self._peer_id))
        other = self._other
        if other._farewell is None:
            other._farewell = PeerUnreachableError(f"peer {self._own_id} ended the stream", self._own_id)
        other._wake_reader()
        other._tell_end()

    def abort(self, why: SwarmkitError) -> None:
        """End both ends at once; frames under way are lost."""
        self._finish(why)
        lost = PeerUnreachableError(f"the connection to peer {self._own_id} was lost", self._own_id)
        self._other._finish(lost)

    def _take(self) -> bytes:
        _, frame = self._frames.popleft()
        self._queued -= len(frame) + _FRAME_COST
        self._wake_writer()
        return frame

    def _check_sendable(self) -> None:
        if (why := self._end or self._farewell) is not None:
            raise _again(why)

    def _finish(self, why: SwarmkitError) -> None:
        if self._end is None:
            self._end = why
        self._frames.clear()
        self._queued = 0
        self._wake_reader()
        self._tell_end()
        for end in (self, self._other):  # senders that wait for room at either end have lost the conversation
            while end._writers:
                end._wake_writer()

    async def _wait(self, at_most: float | None = None) -> None:
        if self._reader is not None:
            raise UsageError("two tasks receive from one stream; let one of them hand frames to the other")
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        alarm = None if at_most is None else loop.call_later(at_most, self._wake_reader)
        try:
            await self._reader
        finally:
            self._reader = None
            if alarm is not None:
                alarm.cancel()

    async def _wait_for_room(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._writers.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                with contextlib.suppress(ValueError):
                    self._writers.remove(waiter)
            else:  # it was this one's turn: pass it on
                self._wake_writer()
            raise

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _tell_end(self) -> None:
        said = self._farewell is not None and not self._network.is_silent(self._own_id, self._peer_id)
        if self._on_end is not None and (said or self._end is not None):
            call, self._on_end = self._on_end, None
            call()

    def _wake_writer(self) -> None:
        while self._writers:
            waiter = self._writers.popleft()
            if not waiter.done():  # a cancelled one has no use for its turn
                waiter.set_result(None)
                return


class MemoryTransport(Transport):
    """One peer of a `MemoryNetwork`. Made by `MemoryNetwork.transport`."""

    def __init__(
        self,
        network: MemoryNetwork,
        identity: Identity,
        record_check: RecordCheck | None,
        swarm_key: SwarmKey | None = None,
    ) -> None:
        self.network = network
        self._identity = identity
        self._key = swarm_key
        if swarm_key is not None:
            swarm_key.check_own(identity.peer_id)
        self._check = record_check if swarm_key is None else swarm_key.check_sealed(record_check)
        self._lists = TableLists(identity.peer_id)
        self._handlers: dict[str, Handler] = {}
        self._streams: weakref.WeakSet[MemoryStream] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: dict[str, set[asyncio.Task[None]]] = {}
        """The tasks of incoming streams, by the streams' name."""
        self._end: TransportError | None = None

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def peer_id(self) -> str:
        return self._identity.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        return (f"/memory/{self.peer_id}/p2p/{self.peer_id}",)

    async def listen(self, name: str, handler: Handler) -> None:
        """See `Transport.listen`. A second handler of the same name replaces the first."""
        self._check_running()
        self._handlers[name] = handler

    async def unlisten(self, name: str) -> None:
        """See `Transport.unlisten`."""
        self._handlers.pop(name, None)
        await _ended(self._serving.pop(name, set()))

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        """See `Transport.open`. Addresses are of no use here: everybody is known by their peer id."""
        self._check_running()
        network, own_id = self.network, self.peer_id
        try:
            with anyio.fail_after(timeout):
                while network.is_silent(own_id, peer_id):
                    await network._next_resume()
                await asyncio.sleep(2 * network.link(own_id, peer_id).delay)
        except TimeoutError:
            raise PeerTimeoutError(f"peer {peer_id} did not answer within {timeout:g} s", peer_id) from None
        self._check_running()
        peer = network._peers.get(peer_id)
        if peer is None or network.link(own_id, peer_id).cut:
            raise PeerUnreachableError(f"peer {peer_id} cannot be reached", peer_id)
        handler = peer._handlers.get(name)
        if handler is None:
            raise NotServedError(f"peer {peer_id} does not serve {name!r}", peer_id)
        here, there = MemoryStream.pair(network, own_id, peer_id)
        self._streams.add(here)
        peer._streams.add(there)
        peer._spawn(peer._serve(handler, there, name), name)
        if self._key is not None or peer._key is not None:
            await self._prove(here, name, is_asked=peer._key is not None, timeout=timeout)
        return here

    async def _prove(self, stream: MemoryStream, name: str, *, is_asked: bool, timeout: float) -> None:
        """Prove to a peer that this one has the swarm's key; see `prove_to_server`."""
        try:
            with anyio.fail_after(timeout):
                first = await stream.receive() if is_asked else b""
                await prove_to_server(self._key, first, stream, name, self.peer_id)
        except TimeoutError:
            stream.close()
            raise PeerTimeoutError(
                f"peer {stream.peer_id} did not answer within {timeout:g} s", stream.peer_id
            ) from None
        except BaseException:
            stream.close()
            raise

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        """See `Transport.store`."""
        self._check_running()
        await asyncio.sleep(0)
        pairs, subkey = checked_records(records, expires_at), service_id(self.peer_id, service)
        if self._is_refused("rpc_store"):
            return 0
        if self._key is not None:
            pairs = [(key, self._key.seal(subkey, value, expires_at)) for key, value in pairs]
        return sum(self.network._keep(key, subkey, bytes(value), expires_at) for key, value in pairs)

    async def fetch(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, bytes]]:
        """See `Transport.fetch`."""
        self._check_running()
        await asyncio.sleep(0)
        if self.network._is_isolated(self.peer_id) or self._is_refused("rpc_find"):
            raise NoContactError("no other peer of this network answers; heal its links, or resume it")
        found: dict[str, Mapping[str, bytes]] = {}
        for key in keys:
            held = self.network._held(key)
            if good := {
                s: self._opened(s, value, until)
                for s, (until, value) in held.items()
                if self._accepts(key, s, value, until)
            }:
                found[key] = good
        return found

    def deal_with(self, lists: PeerLists) -> contextlib.AbstractContextManager[None]:
        """See `Transport.deal_with`. Here only the records of peers that are blocked are affected."""
        return self._lists.of_part(lists)

    def admits(self, peer_id: str) -> bool:
        """See `Transport.admits`."""
        return self._lists.admit(peer_id)

    def kill(self) -> None:
        """See `Transport.kill`."""
        self._leave(TransportError("this peer was killed; start a new one"))

    async def close(self) -> None:
        """See `Transport.close`."""
        caller = asyncio.current_task()
        self._leave(TransportError("this transport was closed; create a new one"), spare=caller)
        await _ended(self._tasks, spare=caller)

    def _leave(self, why: TransportError, spare: asyncio.Task[Any] | None = None) -> None:
        if self._end is None:
            self._end = why
            self.network._leave(self.peer_id)
        for stream in list(self._streams):
            stream.abort(why)
        for task in self._tasks:
            if task is not spare:
                task.cancel()

    def _check_running(self) -> None:
        if self._end is not None:
            raise TransportError(str(self._end))

    def _is_refused(self, request: str) -> bool:
        """Whether there are other peers, and all of them refuse a request to the table for this one's
        certificates.
        """
        others = [peer for peer in self.network._peers.values() if peer is not self]
        shown = b"" if self._key is None else self._key.credentials
        needed = roles_of_request(request)
        return bool(others) and all(
            peer._key is not None and peer._key.fault_of(self.peer_id, shown, needed) for peer in others
        )

    def _accepts(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        if self._lists.block(peer_of(subkey)):
            return False
        return self._check is None or self._check(key, subkey, value, expires_at)

    def _opened(self, subkey: str, value: bytes, expires_at: float) -> bytes:
        """A record that was accepted, as its peer stored it."""
        opened = value if self._key is None else self._key.unseal(subkey, value, expires_at)
        assert opened is not None, "the check has opened it"
        return opened

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine)
        for tasks in (self._tasks, self._serving.setdefault(name, set())):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _serve(self, handler: Handler, stream: MemoryStream, name: str) -> None:
        try:
            if self._key is not None:
                await admit_opener(self._key, stream, name, self.peer_id)
            await handler(stream)
        except Exception:
            logger.debug("a stream from peer %s ended", stream.peer_id, exc_info=True)
        finally:
            stream.close()

    def _wake_streams(self) -> None:
        for stream in list(self._streams):
            stream._wake_reader()
            stream._tell_end()

    def _end_streams_with(self, peer_id: str) -> None:
        for stream in list(self._streams):
            if stream.peer_id == peer_id:
                stream.abort(PeerUnreachableError(f"the connection to peer {peer_id} was lost", peer_id))


async def _ended(tasks: set[asyncio.Task[None]], spare: asyncio.Task[Any] | None = None) -> None:
    """Cancel tasks, and wait until all but `spare` have ended."""
    while pending := [task for task in tasks if task is not spare and not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)


def _again(error: SwarmkitError) -> SwarmkitError:
    """A new instance each time: one exception raised twice would gather tracebacks."""
    if isinstance(error, PeerUnreachableError):
        return PeerUnreachableError(str(error), error.peer_id)
    return type(error)(str(error))
