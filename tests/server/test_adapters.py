"""Clients' adapters on a server: within quotas, used by their sessions, refused where they do not fit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from swarmkit.models.adapters.adapter import Adapter
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.adapter_messages import ADAPTER, AdapterKept, PutAdapter
from swarmkit.net.protocol.gradient_messages import Backward
from swarmkit.net.protocol.messages import Fault, Open, Opened
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.transport.shares import Holder
from swarmkit.server.adapters.service import AdapterService
from swarmkit.server.adapters.store import AdapterStore, NoRoomError
from swarmkit.server.training.work import check_request

from ..models.tuned import random_adapter
from ..waiting import eventually
from .worlds import (
    MAX_LENGTH,
    START,
    STOP,
    TinyClient,
    TinyServer,
    World,
    frame,
    hidden_states,
    small_settings,
)

MODULES = ("self_attn.q_proj", "self_attn.v_proj")


def an_adapter(world: World, seed: int = 0, **changes: Any) -> Adapter:
    return random_adapter(world.stage.fittings, START, STOP, MODULES, seed=seed, **changes)


def message_of(world: World, adapter: Adapter, **changes: Any) -> PutAdapter:
    spec = adapter.spec
    values, _ = codec.encode(adapter.values)
    plain = PutAdapter(
        world.checkpoint.fingerprint,
        spec.start,
        spec.stop,
        tuple(map(tuple, spec.lora)),  # type: ignore[arg-type]
        spec.prompt_tokens,
        values,
        adapter.digest,
        spec.prompt_rows,
    )
    return msgspec.structs.replace(plain, **changes)


class Owner:
    """A client that has adapters: a stream for them, and sessions."""

    def __init__(self, world: World, transport: Any, server: TinyServer) -> None:
        self.world, self.transport, self.server = world, transport, server

    async def put(self, adapter: Adapter, values: Tensor | None = None, **changes: Any) -> Any:
        peer_id, addresses = self.server.transport.peer_id, self.server.transport.addresses
        stream = await self.transport.open(peer_id, ADAPTER.endpoint, addresses)
        conversation = MessageStream(stream, ADAPTER)
        sent = adapter.values if values is None else values
        spec, data = codec.encode(sent)
        message = message_of(self.world, adapter, **{"values": spec, **changes})
        await conversation.send(message, [data])
        reply: Any = (await conversation.receive()).message
        conversation.close()
        return reply

    async def open(self, adapter: str) -> tuple[TinyClient, Any]:
        client = await self.server.client()
        fingerprint = self.world.checkpoint.fingerprint
        return client, await client.ask(Open(fingerprint, START, STOP, MAX_LENGTH, adapter))


async def serve_adapters(server: TinyServer) -> AdapterService:
    """Let a server take adapters, too."""
    world, service = server.world, server.service
    adapters = AdapterService(
        world.stage,
        world.checkpoint.fingerprint,
        server.engine,
        server.settings,
        service.receive_budget,
        service.adapters,
    )
    await server.transport.listen(ADAPTER.endpoint, adapters.serve)
    return adapters


@pytest.fixture
def nbytes(world: World) -> int:
    return an_adapter(world).nbytes


@pytest.fixture
async def server(world: World, nbytes: int) -> AsyncIterator[TinyServer]:
    """One that has room for two adapters of a client and three in all."""
    settings = small_settings(
        adapter_bytes=3 * nbytes, client_adapter_bytes=2 * nbytes, adapter_max_rank=8, max_sessions=8
    )
    server = await TinyServer(world, settings).start()
    await serve_adapters(server)
    yield server
    server.service.adapters.audit()
    await server.close()


@pytest.fixture
async def owner(world: World, server: TinyServer) -> Owner:
    return Owner(world, await server.join(), server)


async def test_a_session_has_the_adapter_that_it_names(
    world: World, server: TinyServer, owner: Owner
) -> None:
    adapter = an_adapter(world, prompt_tokens=2)
    assert await owner.put(adapter) == AdapterKept(adapter.digest)
    client, reply = await owner.open(adapter.digest)
    assert isinstance(reply, Opened)
    given = hidden_states(1, 5)
    wanted = world.stage.forward(given, world.stage.new_cache(START, STOP, adapter))
    assert torch.equal(await client.step(given), wanted)


async def test_a_batch_without_prompts_for_each_row_is_refused_and_the_session_goes_on(
    world: World, owner: Owner
) -> None:
    adapter = an_adapter(world, rank=1, prompt_tokens=2, prompt_rows=2)
    await owner.put(adapter)
    client, _ = await owner.open(adapter.digest)
    refused = await client.try_step(hidden_states(3, 4))
    assert (refused.code, "prompts for 2 rows" in refused.message) == ("bad_shape", True)
    given = hidden_states(2, 4)
    wanted = world.stage.forward(given, world.stage.new_cache(START, STOP, adapter))
    assert torch.equal(await client.step(given), wanted)


async def test_an_adapter_that_is_not_here_is_asked_for(world: World, owner: Owner) -> None:
    client, reply = await owner.open(an_adapter(world).digest)
    assert isinstance(reply, Fault)
    assert reply.code == "no_adapter"
    assert isinstance(await client.open(), Opened)  # the stream goes on


async def test_what_is_used_least_recently_goes_first(world: World, server: TinyServer, owner: Owner) -> None:
    one, other, third = (an_adapter(world, seed) for seed in range(3))
    await owner.put(one)
    await owner.put(other)
    await owner.put(one)
    await owner.put(third)
    store = server.service.adapters
    assert [adapter.digest in store for adapter in (one, other, third)] == [True, False, True]


async def test_what_a_session_has_is_not_taken_from_it(
    world: World, server: TinyServer, owner: Owner
) -> None:
    adapters = [an_adapter(world, seed) for seed in range(3)]
    clients = []
    for adapter in adapters[:2]:
        await owner.put(adapter)
        clients.append((await owner.open(adapter.digest))[0])
    refused = await owner.put(adapters[2])
    assert refused.code == "over_quota"
    assert "close sessions" in refused.message
    clients[0].close()
    await eventually(lambda: server.service.num_sessions == 1, "the first session ends")
    assert isinstance(await owner.put(adapters[2]), AdapterKept)


async def test_an_adapter_larger_than_the_quota_is_refused_before_its_values_come(
    world: World, server: TinyServer, owner: Owner
) -> None:
    refused = await owner.put(an_adapter(world, rank=8))
    assert refused.code == "over_quota"
    assert len(server.service.adapters) == 0


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "another model": ({"fingerprint": "0" * 32}, "wrong_model", "model"),
    "other blocks": ({"start": 0}, "blocks_not_held", "0:4"),
    "no such module": ({"lora": ((2, "attn.c_attn", 3, 1.0),)}, "bad_adapter", "another model"),
    "a high rank": ({"lora": ((2, "self_attn.q_proj", 9, 1.0),)}, "bad_adapter", "rank 9"),
    "unsorted": ({"lora": ((2, "self_attn.q_proj", 3, 1.0),) * 2}, "bad_adapter", "sorted"),
    "another number": ({"prompt_tokens": 1}, "bad_adapter", "values"),
    "rows without prompts": ({"prompt_rows": 2}, "bad_adapter", "no prompts"),
    "prompts of more rows": ({"prompt_tokens": 1, "prompt_rows": 2}, "bad_adapter", "values"),
    "another name": ({"name": "0" * 64}, "bad_adapter", "hash"),
    "another scale": (
        {"lora": tuple((block, module, 3, 9.0) for block in range(START, STOP) for module in MODULES)},
        "bad_adapter",
        "hash",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_does_not_fit_is_refused_by_name(
    world: World, server: TinyServer, owner: Owner, case: str
) -> None:
    changes, code, words = BAD[case]
    refused = await owner.put(an_adapter(world), **changes)
    assert isinstance(refused, Fault)
    assert refused.code == code
    assert words in refused.message
    assert len(server.service.adapters) == 0


async def test_values_that_are_no_numbers_are_refused(world: World, server: TinyServer, owner: Owner) -> None:
    values = an_adapter(world).values.clone()
    values[3] = float("nan")
    broken = Adapter(an_adapter(world).spec, values, world.stage.fittings)
    assert (await owner.put(broken)).code == "not_finite"
    assert len(server.service.adapters) == 0


async def test_others_are_not_disturbed_by_what_is_refused(world: World, owner: Owner) -> None:
    adapter = an_adapter(world)
    await owner.put(adapter)
    client, _ = await owner.open(adapter.digest)
    given = hidden_states(1, 4)
    cache = world.stage.new_cache(START, STOP, adapter)
    assert torch.equal(await client.step(given), world.stage.forward(given, cache))
    for changes, _, _ in BAD.values():
        await owner.put(an_adapter(world), **changes)
    token = hidden_states(1, 1, 7)
    assert torch.equal(await client.step(token), world.stage.forward(token, cache))


async def test_what_is_no_adapter_ends_the_stream_and_nothing_else(
    world: World, server: TinyServer, owner: Owner
) -> None:
    peer_id, addresses = server.transport.peer_id, server.transport.addresses
    for message in (Open(world.checkpoint.fingerprint, START, STOP, 8), {"type": "PutAdapter"}):
        stream = await owner.transport.open(peer_id, ADAPTER.endpoint, addresses)
        conversation = MessageStream(stream, ADAPTER)
        await stream.send(frame(message))
        reply: Any = (await conversation.receive()).message
        assert reply.code == "bad_message"
        conversation.close()
    assert await owner.put(an_adapter(world)) == AdapterKept(an_adapter(world).digest)


def test_the_gradient_of_no_adapter_cannot_be_asked_for(world: World) -> None:
    hidden, _ = codec.encode(hidden_states(1, 4))
    fingerprint = world.checkpoint.fingerprint
    request = Backward(fingerprint, START, STOP, hidden, gradient=hidden, trains=True)
    with pytest.raises(Refusal, match="no adapter is named"):
        check_request(request, world.stage, fingerprint, 64)


# the store by itself


def test_a_full_store_lets_strangers_adapters_go_and_says_when_all_are_in_use(
    world: World, nbytes: int
) -> None:
    store = AdapterStore(2 * nbytes, nbytes)
    for seed, whose in enumerate(("ann", "bob", "cid")):
        store.put(Holder("", whose), f"{seed}", an_adapter(world, seed))
    assert ["0" in store, "1" in store, "2" in store] == [False, True, True]
    holds = [store.hold("1"), store.hold("2")]
    with pytest.raises(NoRoomError, match="fill this server") as caught:
        store.put(Holder("", "dan"), "3", an_adapter(world, 3))
    assert not caught.value.quota
    for hold in holds:
        assert hold is not None
        hold.release()
    store.put(Holder("", "dan"), "3", an_adapter(world, 3))
    store.audit()


def test_of_a_full_store_the_host_that_has_most_lets_go_first(world: World, nbytes: int) -> None:
    store = AdapterStore(4 * nbytes, nbytes)
    owners = [Holder("a", "ann"), *(Holder("crowd", name) for name in "xyz")]
    for seed, owner in enumerate(owners):
        store.put(owner, f"{seed}", an_adapter(world, seed))
    store.put(Holder("b", "bob"), "4", an_adapter(world, 4))
    assert ["0" in store, "1" in store] == [True, False]


def test_the_clients_of_one_host_have_no_more_than_half_of_the_store_in_use(
    world: World, nbytes: int
) -> None:
    store = AdapterStore(4 * nbytes, nbytes)
    for seed, name in enumerate("xy"):
        store.put(Holder("crowd", name), f"{seed}", an_adapter(world, seed))
        store.hold(f"{seed}")
    with pytest.raises(NoRoomError, match="one address"):
        store.put(Holder("crowd", "z"), "2", an_adapter(world, 2))
    store.put(Holder("b", "bob"), "3", an_adapter(world, 3))


def test_a_hosted_adapter_counts_for_nobody_and_stays(world: World, nbytes: int) -> None:
    store = AdapterStore(nbytes, nbytes)
    store.host("h", "pirate", an_adapter(world))
    store.put(Holder("", "ann"), "1", an_adapter(world, 1))
    store.put(Holder("", "bob"), "2", an_adapter(world, 2))
    assert store.hosted == {"h": "pirate"}
    hold = store.hold("h")
    assert hold is not None
    assert store.nbytes == nbytes
