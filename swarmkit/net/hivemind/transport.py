"""The transport for the world: libp2p through hivemind's daemon, and hivemind's distributed hash table.

Frames go over libp2p streams, which the daemon hands to us as local sockets (`framing`), or directly to the
other peer where that is possible (`way`, `direct`). The daemon is our child process (`daemon`), which is
asked over a socket (`control`). What other peers open is served in `incoming`. The table is in `table`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
import re
import socket
import weakref
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
import base58

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import (
    NoContactError,
    NotServedError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    SwarmkitError,
    TransportError,
    UsageError,
)
from swarmkit.net.hivemind.addresses import ip_of, is_local, multiaddr, tcp_port_of
from swarmkit.net.hivemind.contact import Contact
from swarmkit.net.hivemind.control import DaemonControl, DaemonRefusal
from swarmkit.net.hivemind.daemon import DaemonOptions, P2PDaemon, Reachability
from swarmkit.net.hivemind.direct import SILENCE_S, DirectListener, SealedStream
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.hivemind.incoming import IncomingStreams
from swarmkit.net.hivemind.swarm_time import SwarmTime
from swarmkit.net.hivemind.table import (
    HivemindTable,
    RecordGuard,
    end_tasks,
    load_hivemind,
    owning,
    wake_sleepers,
)
from swarmkit.net.hivemind.way import WayChooser, accepted, stay
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.peer_lists import PeerLists, TableLists
from swarmkit.net.transport.seam import Handler, RecordCheck, Stream, Transport
from swarmkit.net.transport.swarm_key import SwarmKey

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_REQUEST_TIMEOUT_S = 10.0
_WATCH_PERIOD_S = 1.0
_DAEMON_POLL_S = 0.05
_SILENT_S = 2.0
"""Who refuses sooner has a connection that is alive, such as a peer that is just starting: it stays, because
that peer is joining over it.
"""
_PEERS_MET_AT_ONCE = 8
"""Of those that have a connection, besides those whose addresses are known."""
_PEERS_ASKED_FOR_TIME = 4
"""Besides the initial peers."""


class HivemindTransport(Transport):
    """One peer's connection to the swarm. Made by `create`, ended by `close`."""

    def __init__(
        self,
        identity: Identity,
        daemon: P2PDaemon,
        options: DaemonOptions,
        record_check: RecordCheck | None,
        timeouts: _Timeouts,
        clock: Clock,
        swarm_key: SwarmKey | None = None,
    ) -> None:
        self._identity = identity
        self._key = swarm_key
        self._daemon = daemon
        self._options = options
        self._timeouts = timeouts
        self._clock = clock
        self._contact = Contact(clock, options.initial_peers)
        self._swarm_time = SwarmTime(clock, self._contact.initial_ids)
        self._lists = TableLists(identity.peer_id, self._contact.initial_ids)
        self._guard = RecordGuard(
            record_check, clock, self._contact, swarm_key, self._swarm_time, self._lists
        )
        self._addresses: tuple[str, ...] = ()
        self._table: HivemindTable | None = None
        self._p2p: Any = None
        self._server: asyncio.AbstractServer | None = None
        self._streams: weakref.WeakSet[FrameStream] = weakref.WeakSet()
        self._incoming = IncomingStreams(identity.peer_id, swarm_key, clock)
        self._ways = WayChooser(self._streams.add, timeouts.keep_alive_s, clock)
        self._control = DaemonControl(
            lambda: self._daemon.control_socket, self._check_running, lambda: self._contact.heard_at
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hivemind_tasks: set[asyncio.Task[Any]] = set()
        self.holds_back = False
        """Whether the daemon does not dial now because it failed to before: it pauses for up to five minutes,
        and another daemon dials at once.
        """
        self._seen: set[str] = set()
        """The peers to which it had a connection when this peer tried to join the swarm again."""
        self._is_replacing = False
        """Whether the daemon is being stopped, or another one being started in its place."""
        self._end: TransportError | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def create(
        cls,
        *,
        initial_peers: Sequence[str] = (),
        identity: Identity | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        host_maddrs: Sequence[str] | None = None,
        announce_maddrs: Sequence[str] = (),
        use_relay: bool = True,
        use_auto_relay: bool = False,
        reachability: Reachability = "auto",
        client_mode: bool = False,
        direct: bool = True,
        record_check: RecordCheck | None = None,
        swarm_key: SwarmKey | None = None,
        startup_timeout: float = 30.0,
        table_timeout: float = 10.0,
        keep_alive_s: float = SILENCE_S,
        clock: Clock = SYSTEM_CLOCK,
    ) -> HivemindTransport:
        """Start the daemon and join the swarm.

        Args:
            initial_peers: addresses (`/ip4/…/tcp/…/p2p/…`) of some peers of the swarm; none = a new swarm.
            identity: the key pair that names this peer; a fresh random one if not given.
            host, port: where to listen; port 0 = any free one. Use "0.0.0.0" to be reachable from outside.
            host_maddrs: where to listen, as multiaddresses, in place of `host` and `port`.
            announce_maddrs: how others see this peer, if that differs from where it listens.
            use_relay: reach peers that are behind a firewall through relays.
            use_auto_relay: be reachable through a relay oneself.
            reachability: whether this peer can be reached from outside: `private` looks for a relay at once;
                `auto` waits for what other peers find.
            client_mode: neither listen nor keep a part of the table; open streams and look things up only.
            direct: let streams leave the daemons aside where peers can reach each other by plain TCP, at a
                port of its own that the system chooses; not where others see this peer elsewhere than it
                listens.
            record_check: which records to keep and believe, beyond that each is signed by its peer.
            swarm_key: of the private swarm, without which no peer opens a stream here or uses the table.
            startup_timeout: seconds for the daemon to become ready, and again to join the swarm.
            table_timeout: seconds for one store or fetch.
            keep_alive_s: how long the machine of a peer may be silent before a direct stream to it ends.

        Raises:
            UsageError: an address is malformed, or the key is for another peer.
            TransportError: the daemon could not start, or none of the initial peers could be reached.
        """
        await asyncio.to_thread(load_hivemind)
        if host_maddrs is None:
            host_maddrs = (f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}",)
        for address in initial_peers:
            if multiaddr(address) is None or "/p2p/" not in address:
                raise UsageError(f"{address!r} is no peer's address; it should look like /ip4/…/tcp/…/p2p/…")
        for address in (*host_maddrs, *announce_maddrs):
            if multiaddr(address) is None:
                raise UsageError(f"{address!r} is not a multiaddress such as /ip4/0.0.0.0/tcp/31330")
        options = DaemonOptions(
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            initial_peers=initial_peers,
            listen=not client_mode,
            serve_routing=not client_mode,
            nat=not client_mode and not all(is_local(address) for address in host_maddrs),
            use_relay=use_relay,
            use_auto_relay=use_auto_relay,
            reachability=reachability,
        )
        identity = identity or Identity()
        if swarm_key is not None:
            swarm_key.check_own(identity.peer_id)
        daemon = await P2PDaemon.start_to_join(identity, options, startup_timeout=startup_timeout)
        timeouts = _Timeouts(startup_timeout, table_timeout, keep_alive_s)
        self = cls(identity, daemon, options, record_check, timeouts, clock, swarm_key)
        try:
            with anyio.fail_after(startup_timeout):
                if direct and not client_mode and not announce_maddrs:
                    hosts = [ip for address in host_maddrs if (ip := ip_of(address))]
                    self._incoming.direct = await DirectListener.open(
                        hosts, self._streams.add, self._spawn, keep_alive_s
                    )
                await self._attach(initial_peers)
        except TimeoutError:
            await self.close()
            raise TransportError(
                f"could not join the swarm at {', '.join(initial_peers) or 'this machine'} within "
                f"{startup_timeout:g} s; check the addresses, or allow a longer startup_timeout"
            ) from None
        except BaseException:
            await self.close()
            raise
        self._spawn(self._keep_contact())
        return self

    async def _attach(self, initial_peers: Sequence[str]) -> None:
        """Take up work with the daemon: accept its streams, and take part in the table."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: FrameStream(greeting=True, on_connected=self._accept), path=self._stream_socket
        )
        await self._refresh_addresses()
        with owning(self._hivemind_tasks):
            self._p2p = await _p2p_type(self._daemon.folder).replicate(
                multiaddr(f"/unix{self._daemon.control_socket}")
            )
            self._table = await HivemindTable.join(
                self._p2p,
                self._identity,
                initial_peers=initial_peers,
                client_mode=not self._options.listen,
                guard=self._guard,
                contact=self._contact,
                timeout=self._timeouts.table_s,
                clock=self._clock,
            )
        wake_sleepers(self._hivemind_tasks)

    # staying in contact

    async def _keep_contact(self) -> None:
        """Join the swarm again whenever contact with it is lost, and replace a daemon that has ended."""
        while True:
            await anyio.sleep(_WATCH_PERIOD_S)
            try:
                if not self._daemon.is_running or self._table is None:
                    logger.warning("the p2p daemon has ended; starting it again")
                    await self.replace_daemon()
                elif self._is_lost and not await self.rejoin():
                    await anyio.sleep(self._contact.next_pause_s())
                    if self.holds_back and await self._is_left_alone():
                        await self.replace_daemon()
                elif self._swarm_time.should_ask():
                    await self._ask_for_time()
            except (SwarmkitError, TimeoutError, OSError) as error:
                logger.warning("could not join the swarm again, will try again: %s", error)
                await anyio.sleep(self._contact.next_pause_s())

    @property
    def _is_lost(self) -> bool:
        return self._table is not None and self._table.is_alone and self._contact.is_expected

    async def _is_left_alone(self) -> bool:
        """Whether nobody is cut off if the daemon is started again, such as a peer that is joining by it."""
        if not self._is_lost or any(map(_passes_daemon, list(self._streams))):
            return False
        return self._seen.issuperset(await self._control.peers())

    async def rejoin(self) -> bool:
        """Connect to some of the peers that are known. Returns whether one of them answered."""
        assert self._table is not None
        table, met = self._table, False
        self.holds_back, self._seen = False, set()

        async def meet(peer_id: str, addresses: Sequence[str]) -> None:
            nonlocal met
            with anyio.move_on_after(_REQUEST_TIMEOUT_S):
                try:
                    await self._control.connect(peer_id, addresses, _REQUEST_TIMEOUT_S)
                    asked_at = self._clock.now()
                    if await table.meet(peer_id):
                        met = True
                    elif self._clock.now() - asked_at > _SILENT_S:
                        await self.disconnect(peer_id)
                except (SwarmkitError, ValueError) as error:
                    self.holds_back |= "dial backoff" in str(error)
                    logger.debug("peer %s does not answer: %s", peer_id, error)

        with owning(self._hivemind_tasks):
            async with anyio.create_task_group() as tasks:
                for peer_id, addresses in (await self._connected() | self._contact.candidates()).items():
                    tasks.start_soon(meet, peer_id, addresses)
            if met:
                await table.explore()
                logger.info("joined the swarm again")
        return met

    async def _connected(self) -> dict[str, tuple[str, ...]]:
        """Some of the peers to which the daemon has a connection, such as one that has just dialled it."""
        found = await self._control.peers()
        self._seen.update(found)
        return {peer_id: () for peer_id in random.sample(found, min(len(found), _PEERS_MET_AT_ONCE))}

    async def _ask_for_time(self) -> None:
        """Ask peers for the date; what they say is noted where their answers arrive."""
        assert self._table is not None
        table = self._table
        peers = {*self._contact.initial_ids, *table.some_peers(_PEERS_ASKED_FOR_TIME)} - {self.peer_id}
        with owning(self._hivemind_tasks):
            async with anyio.create_task_group() as tasks:
                for peer_id in peers:
                    tasks.start_soon(table.meet, peer_id)

    async def replace_daemon(self) -> None:
        """Start another daemon under the same identity and at the same port."""
        self._is_replacing = True
        try:
            await self._detach()
            # It cannot start if none of its initial peers is there; joining them is tried repeatedly instead.
            options = replace(self._options, host_maddrs=self._listened_at(), initial_peers=())
            self._daemon = await P2PDaemon.start(
                self._identity, options, startup_timeout=self._timeouts.startup_s
            )
        finally:
            self._is_replacing = False
        await self._attach(())
        for name in self._incoming.handlers:
            await self._control.accept_streams(name, self._stream_socket)
        await self.rejoin()

    async def _detach(self) -> None:
        """Give up what belongs to the present daemon; streams that bypass it go on."""
        if self._server is not None:
            self._server.close()
        if self._table is not None:
            self._table.close()
        await end_tasks(self._hivemind_tasks)
        if self._p2p is not None:
            await self._p2p.shutdown()
        self._table = self._p2p = self._server = None
        await self._daemon.stop()

    def _listened_at(self) -> Sequence[str]:
        """Where the daemon listened, with the ports that the system chose for it."""
        ports = {port for address in self._addresses if (port := tcp_port_of(address))}
        if len(ports) != 1:
            return self._options.host_maddrs
        (port,) = ports
        return [re.sub(r"/tcp/0$", f"/tcp/{port}", address) for address in self._options.host_maddrs]

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def peer_id(self) -> str:
        return self._identity.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        """Where other peers can dial this one; looked at again with every `store`."""
        return self._addresses

    @property
    def daemon_pid(self) -> int:
        """The daemon's process id."""
        return self._daemon.pid

    async def listen(self, name: str, handler: Handler) -> None:
        """See `Transport.listen`. A second handler of the same name replaces the first."""
        self._check_running()
        handlers = self._incoming.handlers
        is_new = name not in handlers
        handlers[name] = handler
        if is_new:
            try:
                await self._control.accept_streams(name, self._stream_socket)
            except TransportError:
                del handlers[name]
                raise

    async def unlisten(self, name: str) -> None:
        """See `Transport.unlisten`."""
        if self._incoming.handlers.pop(name, None) is None:
            return
        await self._control.refuse_streams(name, self._stream_socket)
        await self._incoming.end(name)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        """See `Transport.open`. While the daemon is being started again, it is waited for."""
        no_daemon: NoContactError | None = None
        try:
            with anyio.fail_after(timeout):
                while True:
                    try:
                        return await self._open(peer_id, name, addresses, timeout)
                    except NoContactError as error:
                        no_daemon = error
                    await anyio.sleep(_DAEMON_POLL_S)
        except TimeoutError:
            if no_daemon is not None:
                raise PeerUnreachableError(str(no_daemon), peer_id) from None
            self._spawn(self.disconnect(peer_id))
            raise PeerTimeoutError(f"peer {peer_id} did not answer within {timeout:g} s", peer_id) from None
        except ProtocolError as error:
            raise PeerUnreachableError(str(error), peer_id) from None
        except DaemonRefusal as refusal:
            found = _unreachable(peer_id, name, str(refusal))
            if isinstance(found, PeerTimeoutError):
                self._spawn(self.disconnect(peer_id))
            raise found from None

    async def _open(self, peer_id: str, name: str, addresses: Sequence[str], timeout: float) -> Stream:
        self._check_running()
        if peer_id == self.peer_id:
            return await self._open_to_self(name)
        try:
            base58.b58decode(peer_id)
        except ValueError:
            raise PeerUnreachableError(f"{peer_id!r} is not a peer id", peer_id) from None
        began = self._clock.now()
        await self._control.connect(peer_id, addresses, timeout)
        stream = await self._control.open_stream(peer_id, name, timeout)
        self._streams.add(stream)
        offer = await accepted(stream, self._key, name, self.peer_id)
        self._contact.note_reached(peer_id, addresses)
        if offer is None:
            return stream
        return await self._ways.choose(stream, offer, addresses, self._clock.now() - began)

    async def _open_to_self(self, name: str) -> FrameStream:
        """A peer may be its own server; libp2p would refuse to dial it."""
        if name not in self._incoming.handlers:
            raise _unreachable(self.peer_id, name, "protocols not supported")
        loop = asyncio.get_running_loop()
        here, there = FrameStream(), FrameStream()
        for stream, end in zip((here, there), socket.socketpair(), strict=True):
            end.setblocking(False)
            stream.peer_id = self.peer_id
            await loop.create_unix_connection(lambda stream=stream: stream, sock=end)  # type: ignore[misc]
            self._streams.add(stream)
        self._spawn(self._incoming.serve(there, name))
        if await accepted(here, self._key, name, self.peer_id) is not None:
            await stay(here)
        return here

    async def disconnect(self, peer_id: str) -> None:
        """Have the daemon give up its connection to a peer that does not answer, so that it dials anew.

        A connection whose peer has another address now, or which has lost packets for long, looks alive to
        the daemon for about a minute. It stays while streams pass through it.
        """
        if not any(_passes_daemon(stream) for stream in self._streams if stream.peer_id == peer_id):
            await self._control.disconnect(peer_id)

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        """See `Transport.store`."""
        self._check_running()
        stored = await self._table_call(self.table.store(records, expires_at, service))
        await self._refresh_addresses()
        return stored

    async def fetch(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, bytes]]:
        """See `Transport.fetch`."""
        self._check_running()
        return await self._table_call(self.table.fetch(keys))

    def deal_with(self, lists: PeerLists) -> AbstractContextManager[None]:
        """See `Transport.deal_with`."""
        return self._lists.of_part(lists)

    def admits(self, peer_id: str) -> bool:
        """See `Transport.admits`."""
        return self._lists.admit(peer_id)

    def kill(self) -> None:
        """See `Transport.kill`."""
        self._stop_serving(TransportError("this peer was killed; start a new one"))
        self._daemon.kill()

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(asyncio.current_task()))
        await asyncio.shield(self._closing)

    async def _close(self, caller: asyncio.Task[Any] | None) -> None:
        self._stop_serving(TransportError("this transport was closed; create a new one"), spare=caller)
        await end_tasks(self._tasks - {caller} if caller is not None else self._tasks)
        await self._detach()

    @property
    def table(self) -> HivemindTable:
        """This peer's part of the shared table.

        Raises:
            NoContactError: there is none for a moment, as the daemon is being replaced.
        """
        if self._table is None:
            raise NoContactError("this peer is just joining the swarm again; try again in a few seconds")
        return self._table

    def _stop_serving(self, why: TransportError, spare: asyncio.Task[Any] | None = None) -> None:
        if self._end is None:
            self._end = why
        if self._server is not None:
            self._server.close()
        if self._incoming.direct is not None:
            self._incoming.direct.close()
        for stream in list(self._streams):
            stream.abort(why)
        for task in self._tasks:
            if task is not spare:
                task.cancel()

    async def _table_call(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Run a call to the table so that `close` ends it, and hivemind's tasks below it are owned."""
        with owning(self._hivemind_tasks):
            task = self._spawn(call)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
        if task.cancelled():
            raise TransportError(str(self._end))
        error = task.exception()
        if error is None or isinstance(error, SwarmkitError):
            return task.result()
        raise TransportError(f"the shared table failed: {error!r}; restart this peer") from error

    @property
    def _stream_socket(self) -> str:
        return str(self._daemon.folder / "streams.sock")

    def _check_running(self) -> None:
        if self._end is not None:
            raise TransportError(str(self._end))
        if self._is_replacing or not self._daemon.is_running:
            raise NoContactError(
                "the p2p daemon has ended and is being started again; try again in a few seconds. Its last "
                "lines: " + " | ".join(self._daemon.last_lines[-3:]),
                self._contact.heard_at,
            )

    def _accept(self, stream: FrameStream) -> None:
        if self._end is not None:
            stream.abort(self._end)
            return
        self._streams.add(stream)
        self._spawn(self._incoming.serve(stream))

    def _spawn(self, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _refresh_addresses(self) -> None:
        found = await self._control.own_addresses()
        self._addresses = tuple(f"{address}/p2p/{self.peer_id}" for address in found)


@dataclass(frozen=True)
class _Timeouts:
    startup_s: float
    table_s: float
    keep_alive_s: float


def _passes_daemon(stream: FrameStream) -> bool:
    return not stream.has_ended and not isinstance(stream, SealedStream)


def _unreachable(peer_id: str, name: str, why: str) -> PeerUnreachableError | PeerTimeoutError:
    why = " ".join(why.split())[:300]
    if "protocols not supported" in why or "protocol not supported" in why:
        return NotServedError(f"peer {peer_id} does not serve {name!r}", peer_id)
    if "deadline exceeded" in why:
        return PeerTimeoutError(f"peer {peer_id} did not answer in time: {why}", peer_id)
    return PeerUnreachableError(f"peer {peer_id} cannot be reached: {why}", peer_id)


def _p2p_type(folder: Path) -> Any:
    """hivemind's `P2P`, with its socket in our folder rather than loose in the temp folder."""
    base = importlib.import_module("hivemind.p2p").P2P
    return type("P2P", (base,), {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"})
