"""A tiny stage behind a service on an in-memory network, and clients that may say anything to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from swarmkit.errors import PeerUnreachableError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.plan import cache_cost
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.handover_messages import HANDOVER
from swarmkit.net.protocol.messages import (
    PUSH,
    SESSION,
    Fault,
    Link,
    Message,
    Open,
    Opened,
    Step,
    StepDone,
)
from swarmkit.net.protocol.protocol import PROTOCOL_VERSION
from swarmkit.net.rpc.endpoints import listen
from swarmkit.net.rpc.message_stream import HEAD, MessageStream
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Transport
from swarmkit.server.engine.engine import Engine
from swarmkit.server.quota import ClientQuota
from swarmkit.server.sessions.handover import HandoverService
from swarmkit.server.sessions.links import Links
from swarmkit.server.sessions.service import BlockService
from swarmkit.settings import ServerSettings

from ..waiting import eventually

START, STOP = 1, 4
"""The blocks that the tiny stage holds, of the five that its model has."""
HIDDEN = 32
MAX_STEP_TOKENS = 16
MAX_LENGTH = 64

Connect = Callable[[], Awaitable[Transport]]


@dataclass
class World:
    """What the tests of this folder share: a model and one stage of it."""

    checkpoint: Checkpoint
    stage: Stage

    @property
    def kv_bytes(self) -> int:
        return cache_cost(self.checkpoint, self.stage.dtype).token_bytes


def hidden_states(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """[rows, tokens, HIDDEN], seeded noise."""
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def small_settings(**changes: Any) -> ServerSettings:
    """Limits that are quickly reached."""
    limits: dict[str, Any] = {
        "cache_bytes": 8 * 1024**2,
        "max_step_tokens": MAX_STEP_TOKENS,
        "max_session_length": 128,
        "max_sessions": 8,
        "prefix_cache": "off",
    }
    return ServerSettings().replace(**{**limits, **changes})


class TinyServer:
    """A service and the engine under it; over a network of its own, or over the transport handed in."""

    def __init__(
        self,
        world: World,
        settings: ServerSettings | None = None,
        engine: Engine | None = None,
        *,
        network: MemoryNetwork | None = None,
        hands_on: bool = True,
    ) -> None:
        """Args: hands_on: whether it can send outputs to other servers."""
        self.world = world
        self.engine = engine or Engine("test")
        self.settings = settings = settings or small_settings()
        self.quota = ClientQuota(self.engine.clock.now, settings.limits.client_tokens_per_minute)
        links = Links(lambda: self.transport, self._find, 0.5, 1.0) if hands_on else None
        self.service = BlockService(
            world.stage,
            world.checkpoint.fingerprint,
            world.kv_bytes,
            self.engine,
            settings,
            links,
            quota=self.quota,
        )
        self.handover = HandoverService(
            world.stage, self.service, world.kv_bytes, self.engine, settings, links
        )
        self.network = network or MemoryNetwork()
        self.transports: list[Transport] = []

    async def start(self, transport: Transport | None = None, connect: Connect | None = None) -> TinyServer:
        self.connect = connect or self.join
        self.transport = transport or await self.join()
        await listen(self.transport, SESSION, self.service.serve)
        await listen(self.transport, PUSH, self.service.serve_pushes)
        await listen(self.transport, HANDOVER, self.handover.serve)
        return self

    async def _find(self, link: Link, block: int) -> Sequence[str]:
        """Every server of the network has announced every block."""
        return (f"/memory/{link.peer_id}",)

    async def join(self) -> Transport:
        """Somebody new in its network."""
        transport = self.network.transport()
        self.transports.append(transport)
        return transport

    async def client(self, transport: Transport | None = None) -> TinyClient:
        """A stream to the server, of somebody new if no `transport` is given."""
        transport = transport or await self.connect()
        stream = await transport.open(self.transport.peer_id, SESSION.endpoint, self.transport.addresses)
        return TinyClient(MessageStream(stream, SESSION, 2**24), self.world.checkpoint.fingerprint)

    async def session(self, transport: Transport | None = None, **changes: Any) -> TinyClient:
        """An open session, of somebody new if no `transport` is given."""
        client = await self.client(transport)
        reply = await client.open(**changes)
        assert isinstance(reply, Opened)
        client.inlet = reply.inlet
        return client

    def used(self) -> tuple[int, int, int]:
        """Sessions, leased bytes, and bytes of large messages; also checks that all adds up."""
        self.service.audit()
        return (
            self.service.num_sessions,
            self.service.budget.leased_bytes,
            self.service.receive_budget.held_bytes,
        )

    async def empty(self) -> None:
        """Wait until nobody is left."""
        await eventually(lambda: self.used() == (0, 0, 0), "all sessions have ended and nothing is leased")

    async def close(self) -> None:
        for transport in self.transports:
            await transport.close()
        await asyncio.to_thread(self.engine.close)


@dataclass
class TinyClient:
    """The client's half of the protocol, with nothing between a test and the wire."""

    conversation: MessageStream
    fingerprint: str
    position: int = 0
    inlet: str = ""
    received: list[Any] = field(default_factory=list)

    async def ask(self, message: Message, payload: Sequence[Any] = ()) -> Message:
        await self.conversation.send(message, payload)
        return await self.answer()

    async def answer(self) -> Message:
        received = await self.conversation.receive()
        self.received.append(received)
        return received.message

    async def open(self, start: int = START, stop: int = STOP, max_length: int = MAX_LENGTH) -> Message:
        return await self.ask(Open(self.fingerprint, start, stop, max_length))

    async def try_step(
        self,
        hidden: torch.Tensor,
        *,
        position: int | None = None,
        keep: int | None = None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        order: tuple[int, ...] | None = None,
        number: int = 0,
        forward: int = 0,
        travels_as: codec.CodecName = "none",
        answers: tuple[codec.CodecName, ...] = (),
        patience_s: float = 0.0,
    ) -> Message:
        """One step, and the answer to it, whatever it is."""
        at = self.position if position is None else position
        tokens = hidden.shape[1]
        side = [None if tensor is None else codec.encode(tensor) for tensor in (mask, positions)]
        encoded = [codec.encode(hidden, travels_as), *side]
        specs = [None if pair is None else pair[0] for pair in encoded]
        kept = tokens if keep is None else keep
        message = Step(
            at,
            specs[0],  # type: ignore[arg-type]
            kept,
            *specs[1:],
            order=order,
            number=number,
            forward=forward,
            answers=answers,
            patience_s=patience_s,
        )
        reply = await self.ask(message, [pair[1] for pair in encoded if pair is not None])
        if isinstance(reply, StepDone):
            self.position = at + tokens
        return reply

    async def step(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        """One step that succeeds; its output."""
        reply = await self.try_step(hidden, **options)
        assert isinstance(reply, StepDone), reply
        output: torch.Tensor = self.received[-1].tensor(reply.hidden)
        return output

    async def send_frames(self, *frames: bytes) -> None:
        """Send bytes as they are. A server that has heard enough may end the stream before the last one."""
        with contextlib.suppress(PeerUnreachableError):
            for frame in frames:
                await self.conversation.stream.send(frame)

    def close(self) -> None:
        self.conversation.close()


async def fault_of(reply: Awaitable[Message]) -> Fault:
    """The fault that answers a request."""
    message = await reply
    assert isinstance(message, Fault), message
    return message


def head(
    header: bytes,
    payload_bytes: int,
    *,
    magic: bytes = b"SK",
    version: int = PROTOCOL_VERSION,
    header_bytes: int | None = None,
    sent_at: float = 0.0,
) -> bytes:
    """The first bytes of a message, which may lie."""
    claimed = len(header) if header_bytes is None else header_bytes
    return HEAD.pack(magic, version, claimed, payload_bytes, sent_at) + header


def frame(message: Message | dict[str, Any] | list[Any], payload: bytes = b"", **lies: Any) -> bytes:
    """A message in one frame; what is not one of the protocol's messages may be anything."""
    return head(msgspec.msgpack.encode(message), lies.pop("payload_bytes", len(payload)), **lies) + payload


def alone(
    world: World, steps: Sequence[torch.Tensor], start: int = START, stop: int = STOP
) -> list[torch.Tensor]:
    """What a session of these steps yields when nothing else happens."""
    cache = world.stage.new_cache(start, stop)
    return [world.stage.forward(hidden, cache) for hidden in steps]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding: steps that run together may be added up in another order."""
    return torch.allclose(one, other, rtol=0, atol=1e-5)
