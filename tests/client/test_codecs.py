"""Hidden states in fewer bytes: who chooses, what is kept, and that losses are still made good exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from swarmkit.client.session.history import History
from swarmkit.events import HopTrace
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net.protocol.codec import decode, passed
from swarmkit.node.server import Server
from swarmkit.settings import ServerSettings

from .answers import answer, at, prompt
from .recovery import NEW_TOKENS, STAGES, World, a_world, assert_same

LONG = prompt(100)[0]
SLOW = 2.5e5
"""Bit/s: a large message of these tests takes half a second, which is long even for a busy machine."""


def always(*codecs: str, **more: Any) -> dict[str, Any]:
    return {"codecs": codecs, "compress": "always", **more}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(True, id="server-to-server"),
        pytest.param(False, id="through-the-client", marks=pytest.mark.slow),
    ],
)
def compressed(tiny_llama: Checkpoint, request: pytest.FixtureRequest) -> Iterator[World]:
    """A swarm for many kills, all of whose links are int8."""
    with a_world(tiny_llama, **always("int8", push=request.param)) as world:
        yield world


@pytest.fixture(scope="module")
def measured(tiny_llama: Checkpoint) -> Iterator[World]:
    """A swarm whose client may use int8 where it pays."""
    with a_world(tiny_llama, replicas=1, codecs=("int8",)) as world:
        yield world


def latest(world: World, prefill: bool = True) -> list[HopTrace]:
    """The hops of the latest long step, or decode step."""
    return list(next(step for step in reversed(world.client.trace) if (step.tokens > 1) == prefill).hops)


def codecs(world: World, **options: Any) -> list[str]:
    """In what the boundaries of the latest long step were crossed, from the client on."""
    hops = latest(world, **options)
    return [hops[0].sent_codec, *(hop.received_codec for hop in hops)]


# survival


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("way", ["greedy", pytest.param("left-padded batch", marks=pytest.mark.slow)])
def test_a_death_changes_no_token_that_int8_would_have_given(compressed: World, stage: int, way: str) -> None:
    undisturbed = compressed.answer(way)
    compressed.add(STAGES[stage])
    assert_same(
        compressed.answer(way, {NEW_TOKENS // 2: lambda: compressed.in_use(stage).kill()}), undisturbed
    )
    assert codecs(compressed, prefill=False) == ["int8"] * 4


@pytest.mark.parametrize(
    "codec",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "float16")), "int8"],
)
def test_what_a_replacement_is_sent_again_is_what_the_lost_one_computed_on(
    tiny_llama: Checkpoint, codec: str
) -> None:
    """A page is found by a hash of a stage's inputs: those of the same text are found to be there already."""
    with a_world(tiny_llama, replicas=1, **always(codec, prefix_cache_bytes=0)) as world:

        def replace() -> None:
            for stage in range(3):
                world.in_use(stage).kill()
            world.add(*STAGES)

        answer(world.model, LONG, new_tokens=NEW_TOKENS, logits_processor=at({3: replace}))
        kept = kept_bytes(world)
        answer(world.model, LONG, new_tokens=1)
        assert {hop.received_codec for hop in latest(world)} == {codec}
        assert min(kept) > 0
        assert kept_bytes(world) == kept


def kept_bytes(world: World) -> list[int]:
    """Of pages that the latest three servers keep for later sessions."""
    found = []
    for server in world.swarm.servers[-3:]:
        assert isinstance(server, Server)
        assert server.serving.sessions is not None
        found.append(server.serving.sessions.budget.pages.nbytes)
    return found


def test_a_stage_that_is_cut_in_two_is_rebuilt_from_whole_values(tiny_llama: Checkpoint) -> None:
    """Nothing was rounded where it is cut, before it was."""
    with a_world(tiny_llama, replicas=1, **always("int8", prefix_cache_bytes=0)) as world:

        def cut() -> None:
            world.in_use(2).kill()
            world.add((3, 4), (4, 5))

        world.answer(actions={NEW_TOKENS - 2: cut})
        hops = next(step for step in reversed(world.client.trace) if step.recovered).hops
        assert [hop.received_codec for hop in hops] == ["int8", "int8", "none", "int8"]


# what is allowed


def test_nothing_is_lossy_unless_somebody_allows_it(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1) as world:
        make_slow(world)
        assert_same(world.answer(), answer(load_local(tiny_llama), *prompt(7), new_tokens=NEW_TOKENS))
        assert codecs(world) == ["none"] * 4


def test_a_server_that_takes_no_int8_is_sent_none(tiny_llama: Checkpoint) -> None:
    unwilling = ServerSettings().replace(codecs=())
    with a_world(tiny_llama, replicas=1, **always("int8")) as world:
        world.swarm.servers[1].kill()
        world.add(STAGES[1], settings=unwilling)
        world.answer(new_tokens=1)
        assert codecs(world) == ["int8", "none", "none", "int8"]


def test_bytes_are_a_quarter_and_the_trace_says_so(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, **always("int8", push=False)) as world:
        world.answer(new_tokens=1)
        first = latest(world)[0]
    assert (first.sent_bytes, first.received_bytes) == (7 * 33, 7 * 33)  # 32 values and a scale each


# which link


def make_slow(world: World) -> None:
    """Have all ways measured as slow."""
    ids = ["", *(server.peer_id for server in world.swarm.servers)]
    world.client.rates.update({(one, other): 1e3 for one in ids for other in ids})


@pytest.mark.parametrize(
    ("sender", "receiver", "wanted"),
    [
        (None, 0, ["int8", "none", "none", "none"]),
        (0, 1, ["none", "int8", "none", "none"]),
        (1, None, ["none", "none", "int8", "none"]),
        (2, None, ["none", "none", "none", "int8"]),
        (1, 0, ["none", "none", "none", "none"]),
        (None, 2, ["none", "none", "none", "none"]),  # which is pushed to
    ],
)
def test_each_link_and_direction_has_its_own_codec(
    measured: World, sender: int | None, receiver: int | None, wanted: list[str]
) -> None:
    ends = ["" if end is None else measured.swarm.servers[end].peer_id for end in (sender, receiver)]
    measured.client.rates.clear()
    measured.client.rates[ends[0], ends[1]] = 1e3
    measured.answer(new_tokens=1)
    assert codecs(measured) == wanted


def test_a_slow_link_is_found_out_and_then_used_in_int8(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, stages=2, codecs=("int8",), prefix_cache_bytes=0) as world:
        first, second = (server.peer_id for server in world.swarm.servers)
        world.network.set_link(first, second, bandwidth=SLOW)
        ids, mask = prompt(64, 64, 64, 64)  # in two pieces of 16 KiB; the second one may have to wait
        answer(world.model, ids, mask, new_tokens=1)
        assert codecs(world) == ["none"] * 3
        answer(world.model, ids, mask, new_tokens=1)
        assert 0.05 < world.client.rates[first, second] / (SLOW / 8) < 3
        answer(world.model, ids, mask, new_tokens=1)
        assert codecs(world)[1] == "int8"


# what is kept


def test_what_is_sent_is_kept_as_its_receiver_has_it() -> None:
    history, values = History(), torch.randn(2, 5, 40)
    history.write(0, values)
    spec, data = history.encode(2, 5, 2, "int8")
    assert spec.codec == "int8"
    assert torch.equal(history.read(2, 5), decode(spec, data))
    assert torch.equal(history.read(0, 2), values[:, :2])


def test_what_was_sent_before_is_sent_as_it_is() -> None:
    history = History()
    history.write(0, torch.randn(1, 5, 40))
    before = history.read(0, 4).clone()
    spec, data = history.encode(0, 5, 4, "int8")
    assert spec.codec == "none"
    assert torch.equal(decode(spec, data)[:, :4], before)
    assert torch.equal(decode(spec, data), history.read(0, 5))


@pytest.mark.parametrize("codec", ["bfloat16", "float16", "int8"])
def test_what_was_sent_in_a_codec_is_sent_in_it_again(codec: Any) -> None:
    history = History()
    history.write(0, passed(torch.randn(1, 5, 40), codec))
    spec, data = history.encode(0, 5, 5, codec)
    assert spec.codec == codec
    assert torch.equal(decode(spec, data), history.read(0, 5))


# training


def gradient_of(model: Any, rows: int = 4, tokens: int = 32) -> torch.Tensor:
    """Of the usual loss, with respect to the embeddings `[rows, tokens, hidden]`."""
    ids = torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(5))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    (model(inputs_embeds=embeddings, labels=ids).loss * 1e-6).backward()
    assert embeddings.grad is not None
    return embeddings.grad * 1e6


ERRORS = {"bfloat16": 0.02, "float16": 0.002, "int8": 0.08}
"""By how much a gradient through three servers may differ, as a part of its norm: docs/codecs.md says so."""


@pytest.mark.parametrize("name", ERRORS)
def test_gradients_in_a_codec_are_within_its_bound(tiny_llama: Checkpoint, name: str) -> None:
    wanted = gradient_of(load_local(tiny_llama))
    with a_world(tiny_llama, replicas=1, **always(name)) as world:
        found = gradient_of(world.model)
        traffic = world.model.traffic
    assert 0 < (found - wanted).norm() <= ERRORS[name] * wanted.norm()
    as_they_are = 4 * wanted.numel() * 3  # through three servers, each way
    size = 1 + 1 / 32 if name == "int8" else 2
    assert traffic.sent == as_they_are * 3 * size / 4
    assert traffic.received == as_they_are * 2 * size / 4


def test_training_is_exact_unless_its_user_allows_a_codec(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1) as world:
        found = gradient_of(world.model)
    torch.testing.assert_close(found, gradient_of(load_local(tiny_llama)), rtol=1e-5, atol=1e-5)


def test_a_server_that_takes_no_codec_trains_as_ever(tiny_llama: Checkpoint) -> None:
    with a_world(
        tiny_llama, replicas=1, server_settings=ServerSettings().replace(codecs=()), **always("int8")
    ) as world:
        found = gradient_of(world.model)
    torch.testing.assert_close(found, gradient_of(load_local(tiny_llama)), rtol=1e-5, atol=1e-5)


def test_a_server_killed_between_the_two_ways_changes_no_gradient(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, **always("int8")) as world:
        wanted = gradient_of(world.model)
        embeddings = world.model.get_input_embeddings()
        ids = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(5))
        given = embeddings(ids).detach().requires_grad_()
        loss = world.model(inputs_embeds=given, labels=ids).loss * 1e-6
        world.swarm.servers[0].kill()
        loss.backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad * 1e6, wanted, rtol=1e-5, atol=1e-7)


def test_training_over_a_link_that_is_found_to_be_slow_uses_a_codec(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, stages=1, codecs=("int8",)) as world:
        (server,) = world.swarm.servers
        world.network.set_link(world.client.peer_id, server.peer_id, bandwidth=1e6)
        sent = []
        for _ in range(2):
            before = world.model.traffic.sent
            gradient_of(world.model, rows=16, tokens=64)  # in four pieces of 32 KiB
            sent.append(world.model.traffic.sent - before)
    assert sent[1] < 0.5 * 3 * 4 * 16 * 64 * 32
    assert sent[1] < sent[0]
