"""Strangers that take: clients that ask a server for as much of one thing as they can get, and never stop.

==================  ==================================================================================
`a_session`         opens a session, and sends one token after the other
`a_stream`          opens a stream for a session, and says nothing
`a_slow_payload`    announces a prompt in a session, and does not send it
`a_prompt`          sends one long prompt after the other in a session
`a_gradient`        sends one large request for training after the other
`an_adapter`        sends one large adapter after the other, whose name is wrong, so that it is hashed in vain
`a_push`            opens a stream for pushed steps, and says nothing
`a_transfer`        fetches a file of weights over and over
`a_connection`      connects to the port for direct streams, and says nothing
`an_announcement`   announces one server after the other that does not exist
==================  ==================================================================================

Each takes one of its kind until it is refused or cancelled. `take` runs many of them at once, and each again
as soon as it has ended::

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, Target(transport, server.peer_id, fingerprint, 0, 4, 32), a_push, 100)
        ...
        tasks.cancel_scope.cancel()
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
import torch

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import SwarmkitError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.adapter_messages import ADAPTER, AdapterKept, PutAdapter
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.gradient_messages import GRADIENT, Backward, BackwardDone, Working
from swarmkit.net.protocol.messages import PUSH, SESSION, Open, Opened, Step, StepDone
from swarmkit.net.protocol.protocol import PROTOCOL_VERSION, Protocol
from swarmkit.net.protocol.weights_messages import WEIGHTS, FileChunk, FileFound, GetFile
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.rpc.message_stream import HEAD, MAGIC
from swarmkit.net.transport.seam import Transport

_PAUSE_S = 0.01
"""After one that was refused."""
_LIFETIME_S = 600.0
MAX_LENGTH = 4096


@dataclass
class Target:
    """The server that a stranger takes from, and what there is to know of it."""

    transport: Transport
    """The stranger's own."""
    peer_id: str
    fingerprint: str
    start: int
    stop: int
    hidden_size: int
    step_tokens: int = 4096
    """The largest step that it takes."""
    adapter_bytes: int = 2**24
    """Of each adapter, about."""
    addresses: Sequence[str] = ()
    service: int = 0
    port: int = 0
    """For direct streams, on this machine."""
    files: Sequence[str] = ()
    """The hashes of the files that it hands out."""
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def closing(self, stream: ClientStream) -> Iterator[ClientStream]:
        try:
            yield stream
        finally:
            stream.close()

    async def stream(self, protocol: Protocol) -> ClientStream:
        return await connect(
            self.transport,
            protocol,
            self.peer_id,
            self.addresses,
            20.0,
            service=self.service,
            max_payload_bytes=2**28,
        )

    async def session(self) -> ClientStream:
        stream = await self.stream(SESSION)
        try:
            await stream.ask(Open(self.fingerprint, self.start, self.stop, MAX_LENGTH), Opened)
        except BaseException:
            stream.close()
            raise
        return stream

    def noise(self, rows: int, tokens: int) -> tuple[TensorSpec, Any]:
        return codec.encode(0.1 * torch.randn(rows, tokens, self.hidden_size))


Taking = Callable[[Target], Awaitable[None]]


async def take(target: Target, taking: Taking, number: int) -> None:
    """Have so many at a time, each again as soon as it has ended, until cancelled."""
    async with anyio.create_task_group() as tasks:
        for _ in range(number):
            tasks.start_soon(_again, target, taking)


async def _again(target: Target, taking: Taking) -> None:
    for _ in itertools.count():
        with suppress(SwarmkitError, OSError):
            await taking(target)
        await anyio.sleep(_PAUSE_S)


async def a_session(target: Target) -> None:
    with target.closing(await target.session()) as stream:
        spec, data = target.noise(1, 1)
        for position in range(MAX_LENGTH):
            await stream.send(Step(position, spec, 1), [data])
            await stream.answer(StepDone)


async def a_stream(target: Target) -> None:
    with target.closing(await target.stream(SESSION)) as stream:
        await stream.receive()


async def a_slow_payload(target: Target) -> None:
    with target.closing(await target.session()) as stream:
        spec = TensorSpec((1, min(target.step_tokens, MAX_LENGTH), target.hidden_size), "float32")
        header = msgspec.msgpack.encode(Step(0, spec, 1))
        await stream.stream.send(HEAD.pack(MAGIC, PROTOCOL_VERSION, len(header), spec.nbytes, 0.0) + header)
        await stream.receive()


async def a_prompt(target: Target) -> None:
    with target.closing(await target.session()) as stream:
        spec, data = target.noise(1, min(target.step_tokens, MAX_LENGTH))
        for _ in itertools.count():
            await stream.send(Step(0, spec, 1), [data])
            await stream.answer(StepDone)


async def a_gradient(target: Target) -> None:
    with target.closing(await target.stream(GRADIENT)) as stream:
        rows = max(1, target.step_tokens // 128)
        spec, data = target.noise(rows, target.step_tokens // rows)
        gradient = msgspec.structs.replace(spec)
        request = Backward(target.fingerprint, target.start, target.stop, spec, gradient=gradient)
        for _ in itertools.count():
            await stream.send(request, [data, data])
            await _answered(stream)


async def _answered(stream: ClientStream) -> None:
    for _ in itertools.count():
        incoming = await stream.answer(Working | BackwardDone)  # type: ignore[arg-type]
        if isinstance(incoming.message, BackwardDone):
            return


async def an_adapter(target: Target) -> None:
    with target.closing(await target.stream(ADAPTER)) as stream:
        blocks = target.stop - target.start
        tokens = max(1, min(4096, target.adapter_bytes // (4 * blocks * target.hidden_size)))
        values, data = codec.encode(torch.randn(blocks * tokens * target.hidden_size))
        name = "0" * 64
        message = PutAdapter(target.fingerprint, target.start, target.stop, (), tokens, values, name)
        for _ in itertools.count():
            await stream.ask(message, AdapterKept, [data])


async def a_push(target: Target) -> None:
    with target.closing(await target.stream(PUSH)) as stream:
        await stream.receive()


async def a_transfer(target: Target) -> None:
    with target.closing(await target.stream(WEIGHTS)) as stream:
        content = target.files[next(target.numbers) % len(target.files)]
        left = (await stream.ask(GetFile(content), FileFound)).size
        while left > 0:
            left -= (await stream.answer(FileChunk)).nbytes


async def a_connection(target: Target) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        await reader.read()
    finally:
        writer.close()


async def an_announcement(target: Target) -> None:
    now = SYSTEM_CLOCK.time()
    service = next(target.numbers)
    word = Announcement(
        peer_id=target.transport.peer_id,
        fingerprint=target.fingerprint,
        model="a stranger's",
        num_blocks=target.stop,
        start=target.start,
        stop=target.stop,
        state="online",
        throughput=1e12,
        free_cache_tokens=2**40,
        dtype="float32",
        addresses=tuple(target.transport.addresses),
        service=1 + service % 2**16,
        sequence=math.ceil(now * 1e9),
        expires_at=now + _LIFETIME_S,
    )
    await Registry(target.transport).announce(word)


KINDS: dict[str, tuple[Taking, int]] = {
    "sessions": (a_session, 1100),
    "streams": (a_stream, 1200),
    "intake": (a_slow_payload, 128),
    "prompts": (a_prompt, 16),
    "gradients": (a_gradient, 300),
    "adapters": (an_adapter, 64),
    "pushes": (a_push, 1200),
    "weights": (a_transfer, 64),
    "direct connections": (a_connection, 128),
    "announcements": (an_announcement, 64),
}
"""What a stranger takes of each kind, and how many at a time: as many as a server has by default, or more."""
