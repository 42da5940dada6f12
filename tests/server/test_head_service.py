"""A server computes the output layer for strangers: what is malformed is refused, what waits is shared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmkit.models.head.output_layer import OutputLayer, output_layer_bytes
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.logits_messages import LOGITS, MAX_LOGITS_ROWS, GetLogits, Logits
from swarmkit.net.protocol.messages import Fault
from swarmkit.net.rpc.endpoints import listen
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.rpc.receive_budget import ReceiveBudget
from swarmkit.server.config import ServerConfig
from swarmkit.server.head.service import HeadService

from ..waiting import eventually
from .worlds import HIDDEN, TinyServer, World, small_settings


class HeadServer(TinyServer):
    """A tiny server that offers its model's output layer."""

    def __init__(self, world: World, **settings: Any) -> None:
        super().__init__(world, small_settings(**settings))
        self.layer = OutputLayer.load(world.checkpoint)
        self.is_leaving = False
        self.budget = ReceiveBudget(2**24)
        self.head = HeadService(
            self.layer,
            world.checkpoint.fingerprint,
            self.engine,
            self.settings,
            self.budget,
            lambda: self.is_leaving,
            self.quota,
        )

    async def ask(self, hidden: Tensor, **fields: Any) -> tuple[Any, list[Tensor]]:
        """Somebody new asks for logits: the answer, and its tensors."""
        transport = await self.join()
        stream = await transport.open(self.transport.peer_id, LOGITS.endpoint, self.transport.addresses)
        conversation = MessageStream(stream, LOGITS, 2**24)
        spec, data = codec.encode(hidden)
        fields = {"fingerprint": self.world.checkpoint.fingerprint, "top": 3, **fields}
        await conversation.send(GetLogits(hidden=spec, **fields), [data])
        received = await conversation.receive()
        reply = received.message
        if not isinstance(reply, Logits):
            return reply, []
        specs = (reply.values, reply.log_sum_exp, reply.tokens)
        return reply, [received.tensor(spec) for spec in specs if spec is not None]


def states(rows: int = 2, width: int = HIDDEN) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(4))


@pytest.fixture
async def offering(world: World) -> AsyncIterator[HeadServer]:
    server = HeadServer(world)
    await server.start()
    await listen(server.transport, LOGITS, server.head.serve)
    yield server
    await server.close()


async def test_the_largest_logits_come_with_their_tokens(offering: HeadServer) -> None:
    _, (values, total, tokens) = await offering.ask(states(), temperature=0.5)
    logits = offering.layer(states())
    assert torch.equal(values, logits.topk(3).values)
    assert torch.equal(tokens, logits.topk(3).indices)
    torch.testing.assert_close(total, torch.logsumexp(logits / 0.5, dim=1))


async def test_all_logits_come_in_the_order_of_the_vocabulary(offering: HeadServer) -> None:
    reply, (values, _) = await offering.ask(states(), top=0)
    assert reply.tokens is None
    assert torch.equal(values, offering.layer(states()))


@pytest.mark.parametrize(
    ("hidden", "fields", "code"),
    [
        (states(1, HIDDEN - 1), {}, "bad_shape"),
        (states(MAX_LOGITS_ROWS + 1), {}, "too_large"),
        (states(0), {}, "bad_shape"),
        (states().half(), {}, "bad_dtype"),
        (states() * float("nan"), {}, "not_finite"),
        (states(), {"fingerprint": "0" * 32}, "wrong_model"),
        (states(), {"temperature": 0.0}, "bad_message"),
        (states(), {"top": -1}, "bad_message"),
        (states(), {"top": 4097}, "bad_message"),
    ],
)
async def test_what_is_malformed_is_refused(
    offering: HeadServer, hidden: Tensor, fields: dict[str, Any], code: str
) -> None:
    reply, _ = await offering.ask(hidden, **fields)
    assert isinstance(reply, Fault)
    assert reply.code == code
    assert offering.budget.held_bytes == 0


async def test_who_has_had_their_tokens_is_told_to_come_back(world: World) -> None:
    server = HeadServer(world, client_tokens_per_minute=1)
    server.quota.per_minute = 1
    await server.start()
    await listen(server.transport, LOGITS, server.head.serve)
    transport = await server.join()

    async def same() -> Any:
        return transport

    server.join = same  # type: ignore[method-assign]
    await server.ask(states(1))
    reply, _ = await server.ask(states(1))
    assert (reply.code, reply.retry_after_s > 0) == ("busy", True)
    await server.close()


async def test_a_server_that_leaves_computes_no_more(offering: HeadServer) -> None:
    offering.is_leaving = True
    reply, _ = await offering.ask(states())
    assert reply.code == "leaving"


async def test_requests_that_wait_are_computed_in_one_pass(offering: HeadServer) -> None:
    passes = []
    honest = offering.layer

    class Counting:
        """The layer, which notes how many rows each pass has."""

        vocabulary, hidden_size = honest.vocabulary, honest.hidden_size

        def __call__(self, hidden: Tensor) -> Tensor:
            passes.append(len(hidden))
            return honest(hidden)

    offering.head.layer = Counting()  # type: ignore[assignment]
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    holding = asyncio.create_task(
        offering.engine.run(lambda: asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10))
    )
    asking = [asyncio.create_task(offering.ask(states(rows))) for rows in (1, 2, 1)]
    await eventually(lambda: offering.head.waiting == 3, "three requests wait")
    gate.set()
    answers = await asyncio.gather(*asking)
    await holding
    assert passes == [4]
    for rows, (_, (values, *_others)) in zip((1, 2, 1), answers, strict=True):
        torch.testing.assert_close(values, honest(states(rows)).topk(3).values)


async def test_how_long_one_row_takes_is_measured(offering: HeadServer) -> None:
    assert offering.head.row_ms == 0
    await offering.head.measure()
    assert offering.head.row_ms > 0


def test_the_output_layer_takes_room_from_the_cache(world: World) -> None:
    plain = ServerConfig(world.checkpoint, memory_bytes=2**31)
    offering = ServerConfig(
        world.checkpoint, memory_bytes=2**31, settings=plain.settings.replace(offer_head=True)
    )
    taken = plain.fitting().cache_bytes - offering.fitting().cache_bytes
    assert taken == output_layer_bytes(world.checkpoint)
