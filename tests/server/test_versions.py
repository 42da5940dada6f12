"""Clients of earlier versions, as recorded: today's server answers them, or refuses them clearly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import torch

from swarmkit.net.protocol import codec
from swarmkit.net.protocol.gradient_messages import GRADIENT
from swarmkit.net.protocol.messages import SESSION, Fault, tensor_specs
from swarmkit.net.protocol.protocol import OWN_VERSIONS, PROTOCOL_VERSION, Protocol
from swarmkit.net.registry.records import MODELS_KEY, read
from swarmkit.net.rpc.message_stream import HEAD

from ..net.announcements import NOW, announcement, identity
from ..record_conversation import FOLDER, Frame, Recording, tiny_chat_world
from .test_gradients import TrainingServer

PROTOCOLS: dict[str, Protocol] = {each.endpoint: each for each in (SESSION, GRADIENT)}


def recorded(file: Path) -> Recording:
    return msgspec.msgpack.decode(file.read_bytes(), type=Recording)


FILES = sorted(FOLDER.glob("*.msgpack"))
SPOKEN = [file for file in FILES if OWN_VERSIONS.oldest <= recorded(file).version <= OWN_VERSIONS.newest]


def parsed(frame: bytes, protocol: Protocol) -> tuple[Any, list[torch.Tensor]]:
    """A message, and its tensors, of a frame that holds all of it."""
    header_bytes = HEAD.unpack_from(frame)[2]
    message = protocol.decoder.decode(frame[HEAD.size : HEAD.size + header_bytes])
    tensors, offset = [], HEAD.size + header_bytes
    for spec in tensor_specs(message):
        tensors.append(codec.decode(spec, memoryview(frame)[offset : offset + spec.nbytes]))
        offset += spec.nbytes
    return message, tensors


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[TrainingServer]:
    server = await TrainingServer(tiny_chat_world()).start()
    yield server
    await server.close()


async def said_today(server: TrainingServer, endpoint: str, frames: list[Frame]) -> list[bytes]:
    """What the server answers to a client that says what it said then."""
    stream = await (await server.connect()).open(server.transport.peer_id, endpoint)
    found = []
    for frame in frames:
        if frame.from_client:
            await stream.send(frame.data)
        else:
            found.append(await stream.receive())
    stream.close()
    return found


def test_the_present_version_is_recorded() -> None:
    assert FOLDER / f"{PROTOCOL_VERSION}.msgpack" in FILES


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("endpoint", sorted(PROTOCOLS))
@pytest.mark.parametrize("file", SPOKEN, ids=lambda file: file.stem)
async def test_a_client_of_a_version_that_is_spoken_gets_the_same_answers(
    server: TrainingServer, file: Path, endpoint: str
) -> None:
    frames, protocol = recorded(file).conversations[endpoint], PROTOCOLS[endpoint]
    then = [parsed(frame.data, protocol) for frame in frames if not frame.from_client]
    now = [parsed(data, protocol) for data in await said_today(server, endpoint, frames)]
    assert [type(message) for message, _ in now] == [type(message) for message, _ in then]
    for (_, mine), (_, theirs) in zip(now, then, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("version", [1, OWN_VERSIONS.oldest - 1, OWN_VERSIONS.newest + 1, 255])
@pytest.mark.parametrize("endpoint", sorted(PROTOCOLS))
async def test_a_client_of_another_version_is_refused_with_both_versions(
    server: TrainingServer, endpoint: str, version: int
) -> None:
    first = recorded(FILES[-1]).conversations[endpoint][0].data
    other = Frame(True, first[:2] + bytes([version]) + first[3:])
    (answer,) = await said_today(server, endpoint, [other, Frame(False, b"")])
    fault, _ = parsed(answer, PROTOCOLS[endpoint])
    assert isinstance(fault, Fault)
    assert f"version {version} is not {OWN_VERSIONS}" in fault.message


@pytest.mark.parametrize("file", SPOKEN, ids=lambda file: file.stem)
def test_a_record_of_a_version_that_is_spoken_is_believed(file: Path) -> None:
    found = read(MODELS_KEY, identity().peer_id, recorded(file).record, NOW)
    assert found == announcement()
