"""Hands keys and values of running sessions over to another server, and takes those that others hand over.

A client asks for it when this server leaves (`HandOver`), or when it goes on here with a session of a server
that leaves (`AwaitKeys`, and then the other server's `BringKeys`); `handover_messages.py` has the picture.

Keys and values come in pieces, whose sizes and order follow from what this server's own blocks keep of a
token, and from the rows and tokens that the client named. Whatever else comes ends the taking. So what a
stranger can send is bounded by what the client asked for, and a lease covers it before anything is received.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
import torch
from torch import Tensor

from swarmkit.errors import PeerError
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kv.layout import KeysAndValues
from swarmkit.models.kv.page_table import PAGE_TOKENS, pages_for
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.handover_messages import (
    HANDOVER,
    PIECE_BYTES,
    AwaitKeys,
    BringKeys,
    BroughtKeys,
    GetKeysTaken,
    HandedOver,
    HandOver,
    KeysAwaited,
    KeysPiece,
    KeysTaken,
    KeysWelcome,
    key_pieces,
)
from swarmkit.net.protocol.messages import Link
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.rpc.stream_shares import StreamShares
from swarmkit.net.transport.seam import Stream
from swarmkit.server.adapters.service import check_rows
from swarmkit.server.cache.kv_budget import CacheFullError
from swarmkit.server.engine.engine import Engine
from swarmkit.server.sessions.links import Links, NotLinkedError
from swarmkit.server.sessions.service import BlockService
from swarmkit.server.sessions.session import ServedSession
from swarmkit.settings import ServerSettings

_MAX_STREAMS = 256
"""A handover takes one at the old server and two at the new one."""
_AT_A_TIME = 8
"""Sessions that are handed over at once, each with a copy of one piece."""


@dataclass(frozen=True)
class _BlockShape:
    """What one block keeps of a token of a row: keys [heads, dim] and values [heads, dim]."""

    keys: tuple[int, int]
    values: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> _BlockShape:
        """Args: keys, values: [rows, heads, tokens, dim]."""
        return cls((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]), keys.dtype)

    @property
    def nbytes(self) -> int:
        (key_heads, key_dim), (value_heads, value_dim) = self.keys, self.values
        return (key_heads * key_dim + value_heads * value_dim) * self.dtype.itemsize

    def specs(self, rows: int, tokens: int) -> tuple[TensorSpec, TensorSpec]:
        name = codec.dtype_name(self.dtype)
        (key_heads, key_dim), (value_heads, value_dim) = self.keys, self.values
        return (
            TensorSpec((rows, key_heads, tokens, key_dim), name),
            TensorSpec((rows, value_heads, tokens, value_dim), name),
        )

    def rooms(self, rows: int, tokens: int, device: torch.device) -> KeysAndValues:
        """Memory for the keys and the values of whole pages."""
        room = pages_for(tokens) * PAGE_TOKENS
        (key_heads, key_dim), (value_heads, value_dim) = self.keys, self.values
        return (
            torch.empty(rows, key_heads, room, key_dim, dtype=self.dtype, device=device),
            torch.empty(rows, value_heads, room, value_dim, dtype=self.dtype, device=device),
        )


@dataclass(eq=False)
class _Awaited:
    """Keys and values that a session awaits."""

    session: ServedSession
    steps: int
    """That the session had done when it began to wait."""
    rows: int
    tokens: int
    sender: str
    taken: int = 0
    has_begun: bool = False
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    """Around the taking."""


class _Caller(ServerStream):
    """A stream of a client, or of a server that leaves."""

    awaited: tuple[str, _Awaited] | None = None
    """What the client awaits here, with its ticket."""


class HandoverService:
    """Moves keys and values of a stage's sessions from server to server."""

    def __init__(
        self,
        stage: Stage,
        sessions: BlockService,
        kv_bytes: int,
        engine: Engine,
        settings: ServerSettings,
        links: Links | None,
    ) -> None:
        """Args:
        sessions: serves the stage's sessions.
        kv_bytes: of keys and values of one token in one block.
        links: how to reach other servers; none = nothing is handed over.
        """
        self._stage = stage
        self._sessions = sessions
        self._engine = engine
        self._settings = settings
        self.links = links
        self._receive_budget: ReceiveBudget = sessions.receive_budget
        self._streams = StreamShares(_MAX_STREAMS)
        self._sending = anyio.Semaphore(_AT_A_TIME)
        self._awaited: dict[str, _Awaited] = {}
        self._shapes: list[_BlockShape] | None = None
        can = links is not None and stage.new_cache(stage.start, stage.stop).has_pages
        self.kv_bytes = kv_bytes if can else 0
        """As it is announced; 0 where keys and values are neither handed over nor taken."""

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until it ends. Never raises on account of the peer."""
        requests = self._settings.requests
        caller = _Caller(
            stream,
            HANDOVER,
            max_payload_bytes=PIECE_BYTES,
            message_timeout=requests.message_timeout_s,
            clock=self._engine.clock.now,
        )
        try:
            with self._streams.counted(caller) as refusal:
                await caller.serve(lambda incoming: self._answer(caller, incoming), refusal)
        finally:
            if caller.awaited is not None:
                ticket, awaited = caller.awaited
                self._awaited.pop(ticket, None)
                awaited.scope.cancel()

    async def _answer(self, caller: _Caller, incoming: IncomingMessage) -> None:
        message = incoming.message
        match message:
            case AwaitKeys():
                caller.awaited = ticket, awaited = self._await_keys(caller, message)
                self._awaited[ticket] = awaited
                caller.idle_s = self._settings.requests.idle_timeout_s  # the client waits for another server
                await caller.send(KeysAwaited(ticket))
            case GetKeysTaken():
                taken = 0 if caller.awaited is None else caller.awaited[1].taken
                await caller.send(KeysTaken(taken))
            case HandOver():
                await caller.send(HandedOver(await self._hand_over(caller, message)))
            case BringKeys():
                await self._bring(caller, message)
            case _:
                raise Refusal("illegal_message", "no more keys and values are awaited on this stream")

    def _session(self, inlet: str, caller: ServerStream) -> ServedSession:
        """A session of the client that asks."""
        for session in self._sessions.sessions:
            if session.inlet == inlet and session.holder.peer == caller.peer_id:
                return session
        raise Refusal("not_held", "this client has no session of that name here")

    # ------------------------------------------------------------------ the server that leaves

    async def _hand_over(self, caller: ServerStream, message: HandOver) -> int:
        """Bring a session's keys and values to another server; returns how many bytes they were."""
        session = self._session(message.session, caller)
        if self.links is None or not self._sessions.leaving:
            raise Refusal("not_held", "this server hands sessions over only when it leaves")
        link = Link(message.peer_id, (), "", message.service)
        blocks = session.start, session.stop - 1
        with _ending_with(session):
            async with session.taking_turn():
                self._check_held(session, message)
                greeting = BringKeys(message.ticket)
                try:
                    async with self._sending:
                        stream = await self.links.reach(
                            link, blocks, caller.peer_id, HANDOVER, greeting, KeysWelcome
                        )
                        try:
                            return await self._send(stream, session, message)
                        finally:
                            stream.close()
                except NotLinkedError as error:
                    raise Refusal("not_linked", str(error)) from None
                except PeerError as error:
                    text = f"the next server has not taken the keys and values: {error}"
                    raise Refusal("not_linked", text) from None
                finally:
                    session.used_at = self._engine.clock.now()
        raise Refusal("not_held", "the session has ended")

    def _check_held(self, session: ServedSession, message: HandOver) -> None:
        cache = session.cache
        if session.ended or cache.batch != message.rows or message.tokens > cache.tokens:
            raise Refusal(
                "out_of_order",
                f"the session holds {cache.batch} x {cache.tokens} tokens, not {message.rows} x "
                f"{message.tokens}",
            )
        if not cache.has_pages or cache.prompt_order is not None:
            raise Refusal("not_held", "what this session holds cannot be handed over; replay it")

    async def _send(self, stream: ClientStream, session: ServedSession, message: HandOver) -> int:
        cache, total = session.cache, 0
        shapes = [_BlockShape.of(*cache.states(block, 0, 1)) for block in range(session.stop - session.start)]
        timeout_s = self._settings.requests.message_timeout_s
        for piece in key_pieces([message.rows * shape.nbytes for shape in shapes], message.tokens):
            (keys, key_data), (values, value_data) = (
                await self._engine.run(encoded_piece(session, piece))
            ).value
            total += keys.nbytes + values.nbytes
            with stream.within(timeout_s):
                await stream.send(
                    BroughtKeys(session.start + piece.block, piece.low, keys, values), [key_data, value_data]
                )
        with stream.within(timeout_s):
            taken: KeysTaken = (await stream.answer(KeysTaken)).message
        if taken.tokens != message.tokens:
            raise PeerError(f"it says that it holds {taken.tokens} tokens", stream.peer_id)
        return total

    # ------------------------------------------------------------------ the server that goes on

    def _await_keys(self, caller: ServerStream, message: AwaitKeys) -> tuple[str, _Awaited]:
        session = self._session(message.session, caller)
        if self._sessions.leaving:
            raise Refusal("leaving", "this server is about to stop; use another one")
        if message.tokens > session.max_length:
            raise Refusal("too_long", f"this session may hold {session.max_length} tokens a row")
        if not session.cache.has_pages:
            raise Refusal("not_held", "blocks of this kind take no keys and values; replay the session")
        if any(one.session is session for one in self._awaited.values()):
            raise Refusal("out_of_order", "keys and values are awaited for this session already")
        check_rows(session.adapter, message.rows)
        awaited = _Awaited(session, session.steps, message.rows, message.tokens, message.sender)
        return secrets.token_hex(16), awaited

    async def _bring(self, caller: ServerStream, message: BringKeys) -> None:
        """Take what a server brings, all of it or nothing."""
        awaited = self._awaited.get(message.ticket)
        if awaited is None or awaited.sender != caller.peer_id or awaited.has_begun:
            raise Refusal("not_linked", "nobody awaits keys and values of that name from this peer")
        awaited.has_begun = True
        session = awaited.session
        await caller.send(KeysWelcome())
        with awaited.scope, _ending_with(session):
            async with session.taking_turn():
                await self.take(caller, awaited)
        if not awaited.taken:
            raise Refusal("illegal_message", "the session's client awaits the keys and values no more")
        await caller.send(KeysTaken(awaited.taken))

    async def take(self, caller: ServerStream, awaited: _Awaited) -> None:
        """Put the keys and values that a server sends into the session that awaits them."""
        session, rows, tokens = awaited.session, awaited.rows, awaited.tokens
        if session.ended or session.cache.tokens or session.steps != awaited.steps:
            raise Refusal("out_of_order", "the session has begun without them")
        first = session.start - self._stage.start
        shapes = (await self._block_shapes())[first : first + session.stop - session.start]
        try:
            session.lease_pages(rows, tokens)
        except CacheFullError as error:
            raise Refusal("busy", f"{error}; replay the session at another server") from None
        try:
            device = self._stage.device
            made = await self._engine.run(lambda: [shape.rooms(rows, tokens, device) for shape in shapes])
            rooms = made.value
            for piece in key_pieces([rows * shape.nbytes for shape in shapes], tokens):
                await self._take_piece(caller, session, rooms[piece.block], piece, shapes[piece.block], rows)
            await self._engine.run(lambda: session.cache.hold_rooms(rooms, rows, tokens))
            if session.trail is not None:
                session.trail.lose()  # pages that another peer computed are not kept for later sessions
            awaited.taken = tokens
        finally:
            session.after_step(self._engine.clock.now())

    async def _take_piece(
        self,
        caller: ServerStream,
        session: ServedSession,
        room: KeysAndValues,
        piece: KeysPiece,
        shape: _BlockShape,
        rows: int,
    ) -> None:
        """Receive one piece, and put it into its room.

        Raises:
            Refusal: it is not the next one, or not as this server's own blocks would have computed it.
        """
        incoming = await caller.next()
        message: BroughtKeys = incoming.message
        if (message.block, message.position) != (session.start + piece.block, piece.low):
            raise Refusal(
                "illegal_message",
                f"the next piece is of block {session.start + piece.block} from token {piece.low} on, not of "
                f"{message.block} from {message.position} on",
            )
        if (message.keys, message.values) != (wanted := shape.specs(rows, piece.high - piece.low)):
            raise Refusal("bad_shape", f"keys and values must be {wanted} here")
        with ReceiveReservation(self._receive_budget, caller.holder, caller.dismiss) as memory:
            try:
                await memory.take(incoming.nbytes, self._settings.requests.max_admission_wait_s)
            except TimeoutError:
                raise Refusal("busy", "too many large messages are under way") from None
            await incoming.payload()
            parts = incoming.tensor(message.keys), incoming.tensor(message.values)
            await self._engine.run(lambda: _put(room, parts, piece))

    async def _block_shapes(self) -> list[_BlockShape]:
        """What each block of the stage keeps of a token, as seen when it runs one."""
        if self._shapes is None:
            self._shapes = (await self._engine.run(lambda: _shapes_of(self._stage))).value
        return self._shapes


@contextmanager
def _ending_with(session: ServedSession) -> Iterator[anyio.CancelScope]:
    """A scope that is cancelled when the session ends."""
    with anyio.CancelScope() as scope:
        session.sources.add(scope)
        try:
            yield scope
        finally:
            session.sources.discard(scope)


# ---------------------------------------------------------------------- on the engine's thread

Encoded = tuple[TensorSpec, memoryview]


def encoded_piece(session: ServedSession, piece: KeysPiece) -> Callable[[], tuple[Encoded, Encoded]]:
    """Encodes the keys and the values of a piece, when it is called on the engine's thread."""

    def encode() -> tuple[Encoded, Encoded]:
        keys, values = session.cache.states(piece.block, piece.low, piece.high)
        return codec.encode(keys), codec.encode(values)

    return encode


@torch.inference_mode()
def _put(room: KeysAndValues, parts: Sequence[Tensor], piece: KeysPiece) -> None:
    for part in parts:
        if not codec.is_finite(part):
            raise Refusal("not_finite", "the keys and values contain NaN or infinity")
    for whole, part in zip(room, parts, strict=True):
        whole[..., piece.low : piece.high, :] = part


@torch.inference_mode()
def _shapes_of(stage: Stage) -> list[_BlockShape]:
    cache = stage.new_cache(stage.start, stage.stop)
    stage.forward(torch.zeros(1, 1, stage.hidden_size, dtype=stage.dtype, device=stage.device), cache)
    return [_BlockShape.of(*cache.states(block, 0, 1)) for block in range(stage.stop - stage.start)]
