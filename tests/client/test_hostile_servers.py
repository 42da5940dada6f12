"""A server that lies is left aside, and the tokens are those of the swarm without it.

What can be seen of a lie, that is: outputs of the right form may still be wrong.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.events import PeerLost, PeerRefused
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import (
    SESSION,
    Fault,
    GetInfo,
    Message,
    Open,
    Opened,
    ServerInfo,
    Step,
    StepDone,
)
from swarmkit.net.registry.records import ServerState
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, MessageStream
from swarmkit.net.transport.seam import Stream
from swarmkit.settings import ClientSettings

from ..net.announcements import announcement
from ..server.worlds import frame, head
from ..waiting import wait_until

PROMPT = torch.tensor([[1, 5, 9, 4]])
NEW_TOKENS = 5
# Who is silent is soon given up, and who was given up once is not asked again.
HASTY = ClientSettings().replace(first_step_timeout_s=0.5, min_step_timeout_s=0.5, ban_s=60.0)

Lie = Callable[[MessageStream, torch.Tensor, int], Awaitable[None]]
"""Answers the request of a number in place of the output that would be right."""


def saying(message: Message) -> Lie:
    async def lie(conversation: MessageStream, output: torch.Tensor, number: int) -> None:
        await conversation.send(message)

    return lie


def showing(change: Callable[[torch.Tensor], torch.Tensor], **lies: Any) -> Lie:
    """The right output, changed."""

    async def lie(conversation: MessageStream, output: torch.Tensor, number: int) -> None:
        spec, data = codec.encode(change(output))
        await conversation.stream.send(frame({"type": "StepDone", **done(spec, number), **lies}, bytes(data)))

    return lie


def sending(*frames: bytes) -> Lie:
    async def lie(conversation: MessageStream, output: torch.Tensor, number: int) -> None:
        for one in frames:
            await conversation.stream.send(one)

    return lie


async def silence(conversation: MessageStream, output: torch.Tensor, number: int) -> None:
    await asyncio.Event().wait()


async def farewell(conversation: MessageStream, output: torch.Tensor, number: int) -> None:
    conversation.close()


async def half(conversation: MessageStream, output: torch.Tensor, number: int) -> None:
    spec, data = codec.encode(output)
    await conversation.stream.send(frame(StepDone(spec, 0.0, 0.0, number=number), bytes(data))[:-1])
    await asyncio.Event().wait()


async def rounded(conversation: MessageStream, output: torch.Tensor, number: int) -> None:
    spec, data = codec.encode(output, "int8")
    await conversation.send(StepDone(spec, 0.0, 0.0, number=number), [data])


def done(spec: TensorSpec, number: int) -> dict[str, Any]:
    return {"hidden": spec, "queue_ms": 0.0, "compute_ms": 0.0, "number": number}


def poisoned(value: float) -> Lie:
    def change(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[-1, -1, -1] = value
        return output

    return showing(change)


LARGE = TensorSpec((1, 8 * CHUNK_BYTES), "uint8")
ENORMOUS = TensorSpec((2**20, 2**20), "float32")

BUSY = "being busy"

ANYWHERE: dict[str, Lie] = {
    "garbage": sending(random.Random(0).randbytes(500)),
    "an empty frame": sending(b""),
    "deep nesting": sending(head(b"\x91" * 60_000, 0)),
    "another version": sending(frame(GetInfo(), version=9)),
    "an unknown message": sending(frame({"type": "Surprise"})),
    "an enormous announcement": sending(frame(StepDone(ENORMOUS, 0.0, 0.0), payload_bytes=2**42)),
    "much data": sending(frame(StepDone(LARGE, 0.0, 0.0), payload_bytes=LARGE.nbytes), bytes(CHUNK_BYTES)),
    "a fault of an unknown kind": sending(frame({"type": "Fault", "code": "because", "message": ""})),
    "a fault of endless text": sending(frame({"type": "Fault", "code": "busy", "message": "x" * 50_000})),
    "a fault of its own": saying(Fault("internal", "I am broken")),
    "a false accusation": saying(Fault("bad_value", "it was you")),
    BUSY: saying(Fault("busy", "no room")),
    "leaving": saying(Fault("leaving", "goodbye")),
    "news": saying(ServerInfo(0, 5, 0, 0, 0, 0, False)),
    "a question": saying(GetInfo()),
    "an order": saying(Step(0, TensorSpec((0,), "float32"), 0)),
    "the end": farewell,
}
AT_A_STEP: dict[str, Lie] = {
    **ANYWHERE,
    "silence": silence,
    "half an answer": half,
    "another opening": saying(Opened(4)),
    "a row more": showing(lambda output: torch.cat([output, output])),
    "a token more": showing(lambda output: torch.cat([output, output], dim=1)),
    "no tokens": showing(lambda output: output[:, :0]),
    "too narrow": showing(lambda output: output[..., :-1]),
    "too few dimensions": showing(lambda output: output[0]),
    "integers": showing(lambda output: output.long()),
    "bytes": showing(lambda output: output.to(torch.uint8)),
    "NaN": poisoned(float("nan")),
    "infinity": poisoned(float("inf")),
    "a time that is none": showing(lambda output: output, queue_ms=float("nan")),
    "another number": showing(lambda output: output, number=77),
    "no number": showing(lambda output: output, number=0),
    "blaming who is not there": saying(Fault("upstream", "it was the server before me")),
    "a codec that nobody allowed": rounded,
    "a speed that is none": showing(lambda output: output, bytes_per_s=float("nan")),
    "a negative time": showing(lambda output: output, compute_ms=-1.0),
}
AT_THE_OPENING: dict[str, Lie] = {
    **ANYWHERE,
    "no room for a step": saying(Opened(0)),
    "a step's answer": saying(StepDone(TensorSpec((0,), "float32"), 0.0, 0.0)),
}


class HostileServer:
    """A server of all blocks that looks better than any other, is right at first, and then lies."""

    def __init__(self, swarm: LocalSwarm, stage: Stage, lie: Lie, lie_at: int) -> None:
        """Args: lie_at: the number of the step at which it lies; -1 = when a session is opened."""
        self._stage = stage
        self._lie = lie
        self._lie_at = lie_at
        self._swarm = swarm
        self.lies = 0

    async def start(self) -> None:
        assert self._swarm.network is not None
        self._transport = self._swarm.network.transport()
        await self._transport.listen(SESSION.endpoint, self._serve)
        await self._announce("online")

    @property
    def peer_id(self) -> str:
        return self._transport.peer_id

    async def stop(self) -> None:
        await self._announce("leaving")
        await self._transport.close()

    async def _announce(self, state: ServerState) -> None:
        checkpoint = self._swarm.checkpoint
        word = announcement(
            peer_id=self.peer_id,
            fingerprint=checkpoint.fingerprint,
            num_blocks=checkpoint.num_blocks,
            start=0,
            stop=checkpoint.num_blocks,
            state=state,
            throughput=1e12,
            sequence=time.time_ns(),
            expires_at=time.time() + 3000,
        )
        await Registry(self._transport).announce(word)

    async def _serve(self, stream: Stream) -> None:
        conversation = MessageStream(stream, SESSION, 2**24)
        cache = self._stage.new_cache(self._stage.start, self._stage.stop)
        steps = 0
        while True:
            received = await conversation.receive()
            message = received.message
            if isinstance(message, Open):
                if self._lie_at < 0:
                    await self._tell_a_lie(conversation, torch.zeros(1, 1, 1), 0)
                else:
                    await conversation.send(Opened(64))
                continue
            assert isinstance(message, Step)
            output = self._stage.forward(received.tensor(message.hidden), cache)
            if steps == self._lie_at:
                await self._tell_a_lie(conversation, output, message.number)
            else:
                spec, data = codec.encode(output)
                await conversation.send(StepDone(spec, 0.0, 0.0, number=message.number), [data])
            steps += 1

    async def _tell_a_lie(self, conversation: MessageStream, output: torch.Tensor, number: int) -> None:
        self.lies += 1
        await self._lie(conversation, output, number)


@pytest.fixture(scope="module")
def swarm(tiny_llama: Checkpoint) -> Iterator[LocalSwarm]:
    """One honest server."""
    with LocalSwarm(tiny_llama.name, 1, transport="memory", client_settings=HASTY) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def stage(tiny_llama: Checkpoint) -> Stage:
    return Stage.load(tiny_llama, 0, tiny_llama.num_blocks)


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Checkpoint) -> torch.Tensor:
    return generated(load_local(tiny_llama))


def generated(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return tokens


Met = tuple[torch.Tensor, HostileServer, Any]


def meet(swarm: LocalSwarm, stage: Stage, lie: Lie, lie_at: int) -> Met:
    """Generate with a liar in the swarm; the tokens, the liar, and the model's side of the story."""
    liar = HostileServer(swarm, stage, lie, lie_at)
    with portal.lease() as lease:
        lease.call(liar.start)
        try:
            with swarm.model() as model:
                tokens = generated(model)
                return tokens, liar, model
        finally:
            lease.call(liar.stop)


def check(met: Met, undisturbed: torch.Tensor) -> None:
    tokens, liar, model = met
    lost = [event.peer_id for event in model.events if isinstance(event, PeerLost)]
    assert torch.equal(tokens, undisturbed)
    assert (liar.lies, lost) == (1, [liar.peer_id])
    assert model.connection.client.bans.is_banned(liar.peer_id)


def check_gone_round(met: Met, undisturbed: torch.Tensor) -> None:
    """Who says that it is busy may say the truth: it is not banned."""
    tokens, liar, model = met
    busy = [event.peer_id for event in model.events if isinstance(event, PeerRefused)]
    assert torch.equal(tokens, undisturbed)
    assert (liar.lies, busy) == (1, [liar.peer_id])
    assert not model.connection.client.bans.is_banned(liar.peer_id)


def test_a_server_that_does_not_lie_is_used(
    swarm: LocalSwarm, stage: Stage, undisturbed: torch.Tensor
) -> None:
    tokens, liar, model = meet(swarm, stage, silence, 1000)
    assert torch.equal(tokens, undisturbed)
    assert {hop.peer_id for step in model.trace for hop in step.hops} == {liar.peer_id}


@pytest.mark.parametrize("lie", AT_A_STEP)
@pytest.mark.parametrize("lie_at", [0, 2], ids=["first step", "third step"])
def test_a_server_that_lies_at_a_step_is_left_aside(
    swarm: LocalSwarm, stage: Stage, undisturbed: torch.Tensor, lie: str, lie_at: int
) -> None:
    met = meet(swarm, stage, AT_A_STEP[lie], lie_at)
    (check_gone_round if lie == BUSY else check)(met, undisturbed)


@pytest.mark.parametrize("lie", AT_THE_OPENING)
def test_a_server_that_lies_when_a_session_is_opened_is_left_aside(
    swarm: LocalSwarm, stage: Stage, undisturbed: torch.Tensor, lie: str
) -> None:
    met = meet(swarm, stage, AT_THE_OPENING[lie], -1)
    (check_gone_round if lie == BUSY else check)(met, undisturbed)


def test_a_server_that_never_opens_a_session_is_left_aside(
    swarm: LocalSwarm, stage: Stage, undisturbed: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMKIT_NET_CONNECT_TIMEOUT_S", "0.3")
    check(meet(swarm, stage, silence, -1), undisturbed)


def test_the_server_that_took_over_is_left_with_nothing(swarm: LocalSwarm, stage: Stage) -> None:
    meet(swarm, stage, poisoned(float("nan")), 1)
    service: Any = swarm.servers[0].serving.sessions  # type: ignore[attr-defined]
    wait_until(lambda: service.num_sessions == 0, "the session has ended")
    service.budget.audit()
    assert service.budget.leased_bytes == 0


class OldServer(HostileServer):
    """A server of protocol version 1, which serves sessions under that version's name."""

    async def start(self) -> None:
        assert self._swarm.network is not None
        self._transport = self._swarm.network.transport()
        await self._transport.listen("swarmkit/1/session", self._wait)
        await self._announce("online")

    async def _wait(self, stream: Stream) -> None:
        await stream.receive()


def test_a_server_of_an_older_protocol_version_is_left_aside_and_named_as_such(
    swarm: LocalSwarm, stage: Stage, undisturbed: torch.Tensor
) -> None:
    old = OldServer(swarm, stage, silence, 0)
    with portal.lease() as lease:
        lease.call(old.start)
        try:
            with swarm.model() as model:
                assert torch.equal(generated(model), undisturbed)
                reasons = [event.reason for event in model.events if isinstance(event, PeerLost)]
        finally:
            lease.call(old.stop)
    assert len(reasons) == 1
    assert "version 1 is not 2: the peer with version 1 needs an update" in reasons[0]
