"""Records what a client and a server of the present protocol version say to each other, as bytes.

`python -m tests.record_conversation` writes `tests/server/conversations/<version>.msgpack`. Later versions
must answer such a client still, or refuse it clearly (`tests/server/test_versions.py`). So a file is written
once for each version, and not again because a test fails.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.net.protocol.gradient_messages import GRADIENT
from swarmkit.net.protocol.messages import SESSION, GetInfo
from swarmkit.net.protocol.protocol import PROTOCOL_VERSION
from swarmkit.net.registry.records import sign
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.transport.part import PartStream
from swarmkit.net.transport.seam import Buffer

from .net.announcements import announcement, identity
from .server.test_gradients import Line, TrainingServer
from .server.worlds import START, STOP, TinyClient, World

FOLDER = Path(__file__).parent / "server" / "conversations"


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """One frame of a conversation, and whether the client sent it."""

    from_client: bool
    data: bytes


class Recording(msgspec.Struct, frozen=True):
    """What was said in one version.

    Attributes:
        conversations: frames in their order, by endpoint.
        record: an announcement as the table holds it, of `announcements.identity()`.
    """

    version: int
    conversations: dict[str, list[Frame]]
    record: bytes


def tiny_chat_world() -> World:
    """Some blocks of the model that comes with the package, which is the same everywhere."""
    checkpoint = Checkpoint.open("tiny-chat")
    return World(checkpoint, Stage.load(checkpoint, START, STOP, dtype=torch.float32))


def noise(world: World, tokens: int, seed: int) -> torch.Tensor:
    """[1, tokens, hidden], the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, world.checkpoint.hidden_size, generator=generator)


class _Recorded(PartStream):
    """A stream that notes its frames."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.frames: list[Frame] = []

    async def send(self, *parts: Buffer) -> None:
        self.frames.append(Frame(True, b"".join(parts)))
        await super().send(*parts)

    async def receive(self) -> bytes:
        frame = await super().receive()
        self.frames.append(Frame(False, frame))
        return frame


async def record() -> Recording:
    """Hold the conversations."""
    world = tiny_chat_world()
    server = await TrainingServer(world).start()
    client = await server.client()
    session = _Recorded(client.conversation.stream)
    talk = TinyClient(MessageStream(session, SESSION, 2**24), client.fingerprint)
    await talk.ask(GetInfo())
    await talk.open()
    for number, tokens in enumerate((3, 1, 2)):
        await talk.step(noise(world, tokens, number), number=number + 1)
    line = await server.line()
    training = _Recorded(line.conversation.stream)
    lesson = Line(MessageStream(training, GRADIENT, 2**24), line.fingerprint)
    await lesson.ask(noise(world, 2, 10))
    await lesson.ask(noise(world, 2, 10), noise(world, 2, 11))
    await server.close()
    conversations = {SESSION.endpoint: session.frames, GRADIENT.endpoint: training.frames}
    return Recording(PROTOCOL_VERSION, conversations, sign(announcement(), identity()))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{PROTOCOL_VERSION}.msgpack"
    file.write_bytes(msgspec.msgpack.encode(asyncio.run(record())))
    print(f"wrote {file}")
