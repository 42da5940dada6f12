"""Serves sessions: one client per stream, one session per stream.

Everything in a message is checked before it touches a cache. A request that is refused changes nothing, and
the `Fault` that answers it names what was wrong. Whatever ends a stream ends its session and returns its
lease.

A session's steps may also come from the server with the blocks before (`serve_pushes`). Their results, and
the refusals of them, go to the session's client.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext

import anyio
import msgspec

from swarmkit.errors import PeerError, PeerUnreachableError, ProtocolError
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import (
    PUSH,
    SENDERS_FAULT,
    SESSION,
    Attach,
    Attached,
    GetInfo,
    GetResources,
    Link,
    Linked,
    Open,
    Opened,
    PrefixRestored,
    Resources,
    RestorePrefix,
    ServerInfo,
    Step,
    StepDone,
    Unlinked,
    printable,
)
from swarmkit.net.rpc.faults import Refusal, refusal_of
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.rpc.stream_shares import StreamShares
from swarmkit.net.transport.seam import Stream
from swarmkit.net.transport.shares import Holder
from swarmkit.server.adapters.service import check_rows
from swarmkit.server.adapters.store import AdapterStore
from swarmkit.server.cache.kv_budget import CacheFullError, KVBudget
from swarmkit.server.engine.admission_policy import Ahead
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import ExpiredError, Timed
from swarmkit.server.quota import ClientQuota
from swarmkit.server.sessions.admission import AdmissionControl
from swarmkit.server.sessions.links import Links, NotLinkedError
from swarmkit.server.sessions.opening import SessionOpening
from swarmkit.server.sessions.resources import count_resources
from swarmkit.server.sessions.session import LateStepError, ServedSession, check_place, check_step
from swarmkit.server.sessions.session_step import SessionStep
from swarmkit.settings import Limits, ServerSettings

logger = logging.getLogger(__name__)

# A step may also bring a mask over all its past, and positions: small beside hidden states, but bounded too.
_SIDE_BYTES = 16 * 1024 * 1024
# Streams beyond the number of sessions, for clients that only ask, or must be told that the server is full.
_SPARE_STREAMS = 64


class _Client(ServerStream):
    """A client's stream, which may have a session."""

    def __init__(
        self,
        stream: Stream,
        max_payload_bytes: int,
        message_timeout: float,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(
            stream,
            SESSION,
            max_payload_bytes=max_payload_bytes,
            message_timeout=message_timeout,
            clock=clock,
        )
        self.session: ServedSession | None = None


class BlockService:
    """Serves a stage's blocks to any number of clients."""

    def __init__(
        self,
        stage: Stage,
        fingerprint: str,
        kv_bytes_per_token_per_block: int,
        engine: Engine,
        settings: ServerSettings,
        links: Links | None = None,
        *,
        budget: KVBudget | None = None,
        receive_budget: ReceiveBudget | None = None,
        quota: ClientQuota | None = None,
    ) -> None:
        """Make a service.

        Args:
            links: how to reach the servers with the next blocks; none = outputs go to clients only.
            budget, receive_budget: memory for keys and values, and for large messages; its own if not given.
            quota: limits what each client may have computed.
        """
        self._stage = stage
        self._engine = engine
        self._settings = settings
        self._limits = settings.limits
        self._began_at = engine.clock.now()
        self._links = links
        self._clients: dict[str, _Client] = {}
        """Those with a session, by its inlet."""
        self._streams = StreamShares(settings.limits.max_sessions + _SPARE_STREAMS)
        self._sources = StreamShares(self._streams.capacity)
        self._idle = asyncio.Event()
        self._idle.set()
        self.budget = budget or KVBudget(settings.limits.cache_bytes)
        self.receive_budget = receive_budget or ReceiveBudget(settings.requests.receive_budget_bytes)
        self._quota = quota
        self._admission = AdmissionControl(settings, engine, self.receive_budget)
        self.adapters = AdapterStore(settings.adapters.adapter_bytes, settings.adapters.client_adapter_bytes)
        self._opening = SessionOpening(
            stage, fingerprint, kv_bytes_per_token_per_block, settings, self.budget, self.adapters
        )
        self._bytes_per_token = self._opening.bytes_per_token(stage.start, stage.stop)
        self.leaving = False
        self.steps = 0
        self.max_payload_bytes = settings.requests.max_step_tokens * stage.hidden_size * 4 + _SIDE_BYTES

    @property
    def sessions(self) -> list[ServedSession]:
        """Those that are open."""
        return [client.session for client in self._clients.values() if client.session is not None]

    @property
    def num_sessions(self) -> int:
        return len(self._clients)

    @property
    def free_cache_tokens(self) -> int:
        """Tokens of one row that still fit, if a session uses all blocks of the stage."""
        return self.budget.free_bytes // self._bytes_per_token

    @property
    def total_cache_tokens(self) -> int:
        return self.budget.capacity_bytes // self._bytes_per_token

    def audit(self) -> None:
        """Raise AssertionError unless every byte of the cache is accounted for, of sessions between steps."""
        self.budget.audit()
        for session in self.sessions:
            if not session.turn.locked():
                session.audit()

    def set_limits(self, limits: Limits) -> None:
        """Serve within other limits from now on.

        Sessions beyond them end, the longest idle first, and their clients go to other servers. A step that
        runs is finished: a session in the middle of a step stays, and cannot grow while memory is short.
        """
        self._limits = limits
        self.budget.set_capacity(limits.cache_bytes)
        self._make_room(self.budget.overdrawn_bytes, at_once=True)
        self._make_room(len(self._clients) - limits.max_sessions, of_bytes=False, at_once=True)

    async def drain(self, timeout: float) -> bool:
        """Take no new sessions, tell the others to move, wait until they have. Returns whether all did."""
        self.leaving = True
        with anyio.move_on_after(timeout):
            await self._idle.wait()
        return not self._clients

    def stop_waiting(self) -> None:
        """End a `drain` that is under way."""
        self._idle.set()

    # ------------------------------------------------------------------ one stream

    async def serve(self, stream: Stream) -> None:
        """Serve a client's stream until it ends. Never raises on account of the peer."""
        settings = self._settings
        client = _Client(
            stream, self.max_payload_bytes, settings.requests.message_timeout_s, self._engine.clock.now
        )
        retry_after_s = self._admission.next_end_s(len(self._streams))
        try:
            with self._streams.counted(client, retry_after_s) as refusal:
                await client.serve(lambda incoming: self._answer(client, incoming), refusal)
        finally:
            self._end(client)

    async def _answer(self, client: _Client, incoming: IncomingMessage) -> None:
        message = incoming.message
        match message:
            case Step():
                assert client.session is not None  # the protocol lets no step through without one
                client.number = message.number
                await self.take_step(client, client.session, incoming)
            case Open():
                client.session = session = self._open(client, message)
                self._clients[session.inlet] = client
                self._admission.entered(session)
                self._idle.clear()
                requests, codecs = self._settings.requests, self._settings.sessions.codecs
                client.idle_s = requests.idle_timeout_s
                root = b"" if session.trail is None else session.trail.root
                dtype = str(self._stage.dtype).removeprefix("torch.")
                await client.send(Opened(requests.max_step_tokens, session.inlet, root, dtype, codecs))
            case RestorePrefix():
                assert client.session is not None
                await client.send(PrefixRestored(await self._restore_prefix(client.session, message)))
            case Link():
                assert client.session is not None
                await self._link(client, client.session, message)
                await client.send(Linked())
            case GetInfo():
                await client.send(self._info())
            case GetResources():
                if not self._settings.node.report_resources:
                    reason = "this server's owner does not let clients count what it holds"
                    raise Refusal("illegal_message", reason)
                await client.send(self.resources())

    def _info(self) -> ServerInfo:
        return ServerInfo(
            start=self._stage.start,
            stop=self._stage.stop,
            sessions=len(self._clients),
            cache_tokens_free=self.free_cache_tokens,
            cache_tokens_total=self.total_cache_tokens,
            steps=self.steps,
            leaving=self.leaving,
            waiting=self._engine.holds,
            expected_wait_ms=self._engine.ahead(1, self._settings.requests.max_step_tokens).wait_s * 1e3,
            uptime_s=self._engine.clock.now() - self._began_at,
        )

    def resources(self) -> Resources:
        """Count what this service, its engine and its process hold now. Call it on the event loop."""
        counts = len(self._clients), len(self._streams), len(self._sources)
        return count_resources(*counts, self.budget, self.receive_budget, self._engine)

    # ------------------------------------------------------------------ sessions

    def _open(self, client: _Client, message: Open) -> ServedSession:
        if self.leaving:
            raise Refusal("leaving", "this server is about to stop; use another one")
        self._opening.check(message)
        count = len(self._clients)
        is_full = count >= self._limits.max_sessions and not self._make_room(1, of_bytes=False)
        if is_full and not self._make_way(client.holder, 1, of_bytes=False):
            raise self._admission.too_many(f"{count} sessions are open already", count)
        return self._opening.open(message, client.holder, self._engine.clock.now())

    async def _restore_prefix(self, session: ServedSession, message: RestorePrefix) -> int:
        """Let a session that is at its beginning hold what is kept of these pages; returns its tokens."""
        async with session.taking_turn():
            if session.cache.tokens:
                raise Refusal("out_of_order", "pages are recalled before the first step of a session")
            check_rows(session.adapter, 1)
            names = message.names[: session.max_length // PAGE_TOKENS]
            trail = session.trail
            if trail is None or not names:
                return 0
            try:
                session.lease_pages(1, len(names) * PAGE_TOKENS)
                return (await self._engine.run(lambda: trail.recall(names, session.cache))).value
            except CacheFullError:
                return 0
            finally:
                session.after_step(self._engine.clock.now())

    def _make_room(self, needed: int, *, of_bytes: bool = True, at_once: bool = False) -> bool:
        """End idle sessions so that there are `needed` bytes, or places, more. Returns whether any ended.

        Args: at_once: end sessions that have been idle only for a short time, too.
        """
        idle = self._admission.to_evict(self.sessions, needed, of_bytes=of_bytes, at_once=at_once)
        return self._dismiss(idle)

    def _make_way(self, asking: Holder, needed: int, *, of_bytes: bool = True) -> bool:
        """End sessions of peers beyond their share for a peer within its own. Returns whether any ended."""
        capacity = self.budget.capacity_bytes if of_bytes else self._limits.max_sessions
        ends = self._admission.beyond_share(self.sessions, asking, needed, capacity, of_bytes=of_bytes)
        return self._dismiss(ends)

    def _dismiss(self, refusals: dict[str, Refusal]) -> bool:
        for inlet, refusal in refusals.items():
            client = self._clients[inlet]
            self._end(client)
            client.dismiss(refusal)
        return bool(refusals)

    def _grow(self, session: ServedSession, step: Step) -> None:
        """Have a session's lease cover a step, at the cost of idle ones if need be."""
        for is_last in (False, True):  # what has given way may still run a step, and is gone before long
            try:
                return session.lease_for(step)
            except CacheFullError as full:  # noqa: PERF203
                needed, lacking = full.lacking_bytes + self.budget.free_bytes, full.lacking_bytes
                if is_last or not (self._make_room(lacking) or self._make_way(session.holder, needed)):
                    raise self._admission.cache_full(full, len(self._clients)) from None

    def _end(self, client: _Client) -> None:
        if client.session is not None:
            self._admission.left(client.session)
            self._clients.pop(client.session.inlet, None)
            client.session.end()
            self._engine.learned_of(self._stage).arrivals.end(client.session.inlet)
            client.session = None
        if not self._clients:
            self._idle.set()

    async def _link(self, client: _Client, session: ServedSession, message: Link) -> None:
        session.link(None)
        if self._links is None:
            raise Refusal("not_linked", "this server hands outputs to clients only")
        try:
            session.link(await self._links.make(message, session.stop, client.peer_id))
        except NotLinkedError as error:
            raise Refusal("not_linked", str(error)) from None

    # ------------------------------------------------------------------ steps from other servers

    async def serve_pushes(self, stream: Stream) -> None:
        """Serve a stream that brings one session's steps. Never raises on account of the peer."""
        source = ServerStream(
            stream,
            PUSH,
            max_payload_bytes=self.max_payload_bytes,
            message_timeout=self._settings.requests.message_timeout_s,
            clock=self._engine.clock.now,
        )
        client: _Client | None = None
        try:
            with self._sources.counted(source) as refusal, source.life as until_it_ends:
                client = await self._attach(source) if refusal is None else None
                if client is None or client.session is None:  # it may have ended meanwhile
                    return
                session = client.session
                session.sources.add(until_it_ends)
                try:
                    await self._serve_steps(client, session, source)
                except PeerUnreachableError:
                    pass
                finally:
                    session.sources.discard(until_it_ends)
            if client is not None and not session.ended:
                await client.send(Unlinked(session.number))
        except (PeerError, TimeoutError) as error:
            logger.debug("pushes from %s ended: %s", stream.peer_id[-6:], error)
        finally:
            source.close()

    async def _attach(self, source: ServerStream) -> _Client | None:
        """Whose session the steps on this stream are for."""
        message: Attach = (await source.next()).message
        client = self._clients.get(message.inlet)
        if client is None:
            await source.refuse(Refusal("not_linked", "there is no session of that name"))
            return None
        source.idle_s = math.inf  # the session's client may think for long; it ends the session, and so this
        await source.send(Attached())
        return client

    async def _serve_steps(self, client: _Client, session: ServedSession, source: ServerStream) -> None:
        """Run the steps that another server pushes, until it sends what is not allowed; tell the client."""
        while True:
            number = 0
            try:
                incoming = await source.next()
                number = incoming.message.number
                if number > session.number:  # else the session has gone on without this step
                    await self.take_step(client, session, incoming, source)
                    # While steps come this way, the client has nothing to say, and yet is there.
                    client.keep_alive()
                continue
            except LateStepError:
                continue
            except ProtocolError as error:
                logger.info("pushes from %s are not taken: %s", source.peer_id[-6:], printable(str(error)))
                return
            except Exception as error:  # noqa: BLE001 - `refusal_of` raises what is not to be told
                refusal = refusal_of(error)
            if refusal.code in SENDERS_FAULT:
                refusal = Refusal("upstream", str(refusal))
            await client.refuse(refusal, number)

    # ------------------------------------------------------------------ steps

    async def take_step(
        self,
        client: _Client,
        session: ServedSession,
        incoming: IncomingMessage,
        source: ServerStream | None = None,
    ) -> None:
        """Check a step by its header, receive it, run it, push its outputs on, and then tell the client.

        Args: source: the stream from the server that pushed the step; None = it came from the client.
        """
        step: Step = incoming.message
        settings = self._settings
        most, codecs = settings.requests.max_step_tokens, settings.sessions.codecs
        check_step(session, step, self._stage.hidden_size, most, codecs)
        checked = session.steps
        rows, tokens, _ = step.hidden.shape
        if wait_s := self._engine.ahead(rows, tokens, client.holder).wait_s:
            self._admission.check_queue(step, wait_s)
        if self._quota is not None and self._quota.per_minute is not None:
            self._quota.take(client.peer_id, rows * tokens)
        is_large = incoming.nbytes > CHUNK_BYTES
        with await self._admission.room_for(incoming, client) if is_large else nullcontext():
            await incoming.payload()
            async with session.taking_turn():
                if source is not None and step.number <= session.number:
                    raise LateStepError("the session has gone on without this step")
                if session.steps != checked:  # others ran meanwhile
                    check_place(session, step)
                session.number = max(session.number, step.number)
                reply, payload = await self._step(client, session, incoming)
                if step.forward and session.downstream is not None:
                    if await session.downstream.push(step, incoming, reply.hidden, payload):
                        reply = msgspec.structs.replace(reply, forwarded=True)
                        if step.lean:
                            rows, _, width = reply.hidden.shape
                            none = msgspec.structs.replace(reply.hidden, shape=(rows, 0, width))
                            reply, payload = msgspec.structs.replace(reply, hidden=none), memoryview(b"")
                    else:
                        session.link(None)
                if speed := (client if source is None else source).speed.bytes_per_s:
                    reply = msgspec.structs.replace(reply, bytes_per_s=speed)
                await client.send(reply, [payload])

    async def _step(
        self, client: _Client, session: ServedSession, incoming: IncomingMessage
    ) -> tuple[StepDone, memoryview]:
        step: Step = incoming.message
        rows, tokens, _ = step.hidden.shape
        self._grow(session, step)
        try:
            ahead = self._engine.ahead(rows, tokens, client.holder)
            work = SessionStep(self._stage, client.holder, session, step, incoming)
            timed = await self._engine.step(work, step.patience_s)
        except ExpiredError as error:
            raise self._admission.expired(step, error) from None
        finally:
            session.after_step(self._engine.clock.now())
        self.steps += 1
        return self._done(step, timed, ahead)

    def _done(
        self, step: Step, timed: Timed[tuple[TensorSpec, memoryview]], ahead: Ahead
    ) -> tuple[StepDone, memoryview]:
        spec, payload = timed.value
        done = StepDone(
            spec,
            timed.queue_s * 1e3,
            timed.compute_s * 1e3,
            self.leaving,
            step.number,
            ahead=ahead.steps,
            expected_ms=ahead.wait_s * 1e3,
        )
        return done, payload
