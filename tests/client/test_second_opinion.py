"""A share of what servers compute is computed by a second one as well, and a third one decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmkit.client.checks.verdict import loser, witnesses
from swarmkit.client.routing.bans import Bans
from swarmkit.client.routing.route import Hop
from swarmkit.events import OutputsDiffered
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.node.server import Server
from swarmkit.server.sessions.push import Downstream

from ..net.announcements import announcement
from ..waiting import wait_until
from .answers import answer, prompt
from .recovery import WAYS, World, a_world, assert_same
from .test_lies import add_liar, false

__all__ = ["false"]

LONG = prompt(40)[0]
FIRST, SECOND = (0, 2), (2, 5)


@pytest.fixture(scope="module")
def local(tiny_llama: Checkpoint) -> Any:
    return load_local(tiny_llama)


@pytest.fixture
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    """One honest server for each half of the blocks; each step is checked."""
    with a_world(tiny_llama, replicas=1, stages=2, check_share=1.0) as world:
        yield world


def honest(world: World, blocks: tuple[int, int] = FIRST) -> Server:
    """The first server of these blocks, which tells the truth."""
    return next(server for server in world.swarm.servers if server.blocks == blocks)  # type: ignore[return-value]


def until_checked(world: World, checks: int = 1) -> None:
    """Take steps until so many more checks were done."""
    wanted = world.client.checks.done + checks

    def is_done() -> bool:
        world.model(LONG[:, :3], use_cache=True)
        return world.client.checks.done >= wanted

    wait_until(is_done, f"{checks} checks are done")


def differences(world: World) -> list[OutputsDiffered]:
    return world.events(OutputsDiffered)


# who is right


@pytest.mark.parametrize(
    ("first_third", "second_third", "wrong"),
    [
        (9.0, 0.5, "first"),
        (0.5, 9.0, "second"),
        (9.0, 9.0, None),  # three that differ
        (0.9, 0.9, None),  # in between both
        (1.0, 1.1, "second"),
    ],
)
def test_the_one_that_is_alone_is_wrong(first_third: float, second_third: float, wrong: str | None) -> None:
    assert loser(first_third, second_third) == wrong


def test_a_witness_is_another_peer_with_all_the_blocks_whatever_it_claims() -> None:
    servers = [
        announcement(peer_id=name, start=start, stop=stop, num_blocks=5, throughput=claimed)
        for name, start, stop, claimed in [
            ("itself", 0, 5, 1e12),
            ("without", 0, 5, 1.0),
            ("too narrow", 1, 3, 1.0),
            ("avoided", 0, 5, 1.0),
            ("exact", 1, 4, 1.0),
            ("wider", 0, 5, 1e12),
        ]
    ]
    found = witnesses(
        Hop(servers[0], 1, 4), servers, {"itself", "without"}, lambda server: server.peer_id != "avoided"
    )
    assert [(hop.server.peer_id, hop.start, hop.stop) for hop in found] == [("exact", 1, 4), ("wider", 1, 4)]


def test_a_convicted_peer_is_avoided_however_well_it_seems_to_work() -> None:
    now = 0.0
    bans = Bans(2.0, 60.0, lambda: now)
    bans.convict("liar", 3600.0)
    bans.worked("liar")
    assert bans.is_banned("liar")
    now = 3600.0
    assert not bans.is_banned("liar")
    assert not bans.is_convicted("liar")


# lying servers


def test_a_liar_that_a_third_server_finds_wrong_is_left_aside(
    world: World, false: Checkpoint, local: Any
) -> None:
    liar = add_liar(world, false, FIRST)
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=2)  # by the liar: no other server may be asked
        world.client.bans.worked(honest(world).peer_id)
        world.add(FIRST)
        wait_until(lambda: more(world, said) and world.client.bans.convicted != {}, "the liar is convicted")
        assert_same(*both(world, local, said))
    event, *others = [event for event in differences(world) if event.loser]
    # Another opinion of the same steps may have been under way.
    assert {each.loser for each in (event, *others)} == {liar.peer_id}
    assert liar.peer_id in event.peer_ids
    assert (event.start, event.stop) == FIRST
    assert "is left aside" in str(event)


def more(world: World, said: Tensor) -> bool:
    """One more step of the session that is open."""
    world.model.generate(said, attention_mask=torch.ones_like(said), max_new_tokens=1, do_sample=False)
    return True


def both(world: World, local: Any, said: Tensor) -> tuple[Tensor, Tensor]:
    """What the open session and the local model answer to the same text."""
    text = torch.cat([said, LONG[:, :4]], dim=1)
    return answer(world.model, text, new_tokens=4), answer(local, text, new_tokens=4)


def test_where_no_third_server_is_the_difference_is_told_and_nobody_is_blamed(
    world: World, false: Checkpoint
) -> None:
    liar = add_liar(world, false, FIRST)
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=2)
        world.client.bans.worked(honest(world).peer_id)
        wait_until(lambda: more(world, said) and differences(world) != [], "a difference is told")
    event = differences(world)[0]
    assert set(event.peer_ids) == {liar.peer_id, honest(world).peer_id}
    assert event.loser == ""
    assert world.client.bans.convicted == {}


def test_a_false_witness_is_the_one_that_is_left_aside(world: World, false: Checkpoint, local: Any) -> None:
    world.add(FIRST)
    world.model(LONG)  # so that the honest ones have worked
    answer(world.model, LONG, new_tokens=2)
    liar = world.swarm.add(lambda place: Server(false, blocks=FIRST, transport=place.transport))
    world.look()
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=2)
        wait_until(lambda: more(world, said) and world.client.bans.convicted != {}, "a peer is convicted")
    assert list(world.client.bans.convicted) == [liar.peer_id]


def test_a_server_that_was_pushed_something_else_is_not_blamed_for_it(
    world: World, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Downstream.push

    async def false_push(self: Downstream, step: Any, incoming: Any, spec: Any, output: Any) -> bool:
        values = torch.frombuffer(bytearray(output), dtype=torch.float32)
        return await push(self, step, incoming, spec, memoryview((values * 1.5).numpy()).cast("B"))

    monkeypatch.setattr(Downstream, "push", false_push)
    world.add(SECOND, SECOND)
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=2)
        wait_until(lambda: more(world, said) and differences(world) != [], "a difference is told")
        assert_same(*both(world, local, said))
    assert {event.loser for event in differences(world)} == {""}
    assert world.client.bans.convicted == {}


# honest servers


@pytest.mark.parametrize("way", WAYS)
def test_honest_servers_agree_in_every_way_to_generate(tiny_llama: Checkpoint, local: Any, way: str) -> None:
    lengths, how = WAYS[way]
    wanted = answer(local, *prompt(*lengths), new_tokens=6, **how)
    with a_world(tiny_llama, replicas=2, stages=2, check_share=1.0) as world:
        assert_same(world.answer(way), wanted)
        until_checked(world, 3)
        assert differences(world) == []


def test_servers_of_other_precisions_are_not_taken_for_liars(world: World) -> None:
    for precision in ("bfloat16", "float16"):
        world.add(FIRST, SECOND, dtype=precision)
    until_checked(world, 8)
    assert differences(world) == []


def test_no_token_waits_for_a_second_opinion(world: World, local: Any) -> None:
    (hanging,) = world.add(FIRST)
    world.model(LONG)
    answer(world.model, LONG, new_tokens=2)  # the other one has worked, and is used
    world.hang(hanging)
    assert_same(answer(world.model, LONG, new_tokens=6), answer(local, LONG, new_tokens=6))


def test_without_a_share_nothing_is_checked(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=2, stages=1, check_share=0.0) as world:
        world.answer()
        assert world.client.checks.done == 0
        assert world.client.checks.has_room
