"""Servers without room are gone round, or waited for, and the tokens stay what they would have been."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import anyio
import pytest
import torch
from torch import Tensor

from swarmkit.client.routing.busy import BusyPeers
from swarmkit.client.routing.route import find_route, route_cost
from swarmkit.errors import NoRouteError
from swarmkit.events import PeerRefused, WaitStarted, following
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.plan import cache_cost
from swarmkit.settings import ServerSettings

from ..clocks import SetTime
from ..net.announcements import announcement
from ..waiting import wait_until
from .answers import answer, prompt
from .recovery import NEW_TOKENS, World, a_world, assert_same


@pytest.fixture
def clock() -> SetTime:
    return SetTime()


@pytest.fixture
def busy(clock: SetTime) -> BusyPeers:
    return BusyPeers(clock)


def test_a_busy_peer_is_left_alone_for_as_long_as_it_says(busy: BusyPeers, clock: SetTime) -> None:
    busy.note("peer", 3.0)
    clock.now += 2.0
    assert busy.wait_s("peer") == pytest.approx(1.0)
    clock.now += 1.0
    assert busy.wait_s("peer") == 0


def test_what_is_said_is_believed_within_bounds(busy: BusyPeers) -> None:
    assert busy.note("long", 1e9) <= 60
    assert busy.note("short", 0.0) > 0


def test_a_peer_that_stays_busy_is_asked_less_and_less_often(busy: BusyPeers, clock: SetTime) -> None:
    waits = []
    for _ in range(4):
        waits.append(busy.note("peer", 0.0))
        clock.now += waits[-1]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8])


def test_sessions_that_are_told_the_same_count_once(busy: BusyPeers) -> None:
    assert busy.note("peer", 0.0) == busy.note("peer", 0.0)


def test_a_peer_that_was_not_busy_for_long_begins_anew(busy: BusyPeers, clock: SetTime) -> None:
    clock.now += busy.note("peer", 0.0) + 60
    assert busy.note("peer", 0.0) == pytest.approx(0.1)


def test_a_peer_that_a_session_has_left_has_room_whatever_it_said(busy: BusyPeers) -> None:
    busy.note("peer", 30.0)
    busy.has_room("peer")
    assert busy.wait_s("peer") == 0
    assert busy.note("peer", 0.0) == pytest.approx(0.1)  # and is not asked less often than before


async def told(busy: BusyPeers, waiting: dict[str, tuple[set[str], float]], *rooms: str) -> list[str]:
    """Which of some sessions, by name, go on before their time when these peers have room."""
    went_on: list[str] = []

    async def wait(name: str, peer_ids: set[str], since: float) -> None:
        await busy.wait(peer_ids, since, 1000.0)
        went_on.append(name)

    async with anyio.create_task_group() as tasks:
        for name, (peer_ids, since) in waiting.items():
            tasks.start_soon(wait, name, peer_ids, since)
        await anyio.wait_all_tasks_blocked()
        for peer_id in rooms:
            busy.has_room(peer_id)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    return went_on


@pytest.mark.parametrize(
    ("rooms", "sessions"),
    [([], []), (["a"], ["first"]), (["a", "a"], ["first", "second"]), (["b"], ["other"]), (["c"], [])],
)
async def test_the_session_that_has_waited_for_longest_is_told_of_room(
    busy: BusyPeers, rooms: list[str], sessions: list[str]
) -> None:
    waiting = {"second": ({"a"}, 2.0), "first": ({"a"}, 1.0), "other": ({"b"}, 3.0)}
    assert sorted(await told(busy, waiting, *rooms)) == sorted(sessions)


async def test_a_session_that_has_begun_is_told_of_room_before_those_that_have_not(busy: BusyPeers) -> None:
    went_on: list[str] = []

    async def wait(name: str, since: float, has_begun: bool) -> None:
        await busy.wait({"peer"}, since, 1000.0, has_begun=has_begun)
        went_on.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "new", 1.0, False)
        tasks.start_soon(wait, "begun", 2.0, True)
        await anyio.wait_all_tasks_blocked()
        busy.has_room("peer")
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert went_on == ["begun"]


@pytest.mark.parametrize(
    ("has_begun", "peer_ids", "is_awaited"),
    [
        (True, {"peer", "other"}, True),
        (True, {"other"}, False),
        (False, {"peer"}, False),
    ],
)
async def test_a_peer_is_awaited_by_sessions_that_have_begun(
    busy: BusyPeers, has_begun: bool, peer_ids: set[str], is_awaited: bool
) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(busy.wait, {"peer"}, 0.0, 1000.0, has_begun=has_begun))
        await anyio.wait_all_tasks_blocked()
        assert busy.is_awaited(peer_ids) == is_awaited
        tasks.cancel_scope.cancel()
    assert not busy.is_awaited(peer_ids)


async def test_a_session_waits_no_longer_than_it_means_to(busy: BusyPeers) -> None:
    with anyio.fail_after(60):
        await busy.wait({"peer"}, 0.0, 0.01)


def route_of(waits: dict[str, float], tokens: int = 0, **room: int) -> str:
    servers = [
        announcement(peer_id=name, public_name=name, start=0, stop=6, free_cache_tokens=room.get(name, 1000))
        for name in ("one", "two")
    ]
    cost = route_cost(
        round_trip_s=lambda peer: 0.02,
        penalty_s=lambda peer: 0.0,
        wait_s=lambda peer: waits.get(peer, 0.0),
        tokens=tokens,
    )
    (hop,) = find_route(0, 6, servers, cost)
    return hop.server.peer_id


def test_a_busy_peer_is_gone_round() -> None:
    assert route_of({"one": 2.0}) == "two"


def test_where_all_are_busy_the_one_that_is_free_first_is_used() -> None:
    assert route_of({"one": 2.0, "two": 9.0}) == "one"


def test_a_server_with_room_for_the_session_is_preferred() -> None:
    assert route_of({}, tokens=500, one=499) == "two"
    assert route_of({}, tokens=500, two=499) == "one"


# sessions


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Checkpoint) -> Callable[..., Tensor]:
    local = load_local(tiny_llama)
    return lambda **options: answer(local, *prompt(7), **{"new_tokens": NEW_TOKENS, **options})


def room(checkpoint: Checkpoint, pages: int, **more: object) -> ServerSettings:
    """For one row in the two blocks of the middle stage."""
    of_page = PAGE_TOKENS * 2 * cache_cost(checkpoint, torch.float32).token_bytes
    return ServerSettings().replace(cache_bytes=pages * of_page, prefix_cache="off", **more)  # type: ignore[arg-type]


def with_tight_middle(world: World, settings: ServerSettings) -> None:
    world.swarm.servers[1].stop()
    world.add((1, 3), settings=settings)


def test_a_session_waits_for_room_where_nobody_has_any(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama, replicas=1) as world:
        with_tight_middle(world, room(tiny_llama, 1))
        other = world.model.session()
        other.step(torch.zeros(1, 1, 32))
        with following(world.client.events, lambda event: other.close(), WaitStarted):
            assert_same(world.answer(), undisturbed())
        assert world.lost() == []
        assert [event.busy for event in world.events(WaitStarted)] == [True]
        assert world.events(PeerRefused)[0].retry_after_s > 0


def test_a_session_that_waited_for_room_goes_on_where_it_was(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    """What it holds at the busy server is not computed again."""
    with a_world(tiny_llama, replicas=1, prefix_cache_bytes=0) as world:
        with_tight_middle(world, room(tiny_llama, 2))
        other = world.model.session()
        steps = 30
        with following(world.client.events, lambda event: other.close(), WaitStarted):
            found = world.answer(actions={2: lambda: other.step(torch.zeros(1, 1, 32))}, new_tokens=steps)
        assert_same(found, undisturbed(new_tokens=steps))
        assert len(world.events(WaitStarted)) == 1
        (middle,) = [server for server in world.swarm.servers[3:]]
        service = middle.serving.sessions  # type: ignore[attr-defined]
        assert service.steps == steps + 1  # one of them was the other session's


def test_nobody_has_room_for_as_long_as_the_client_waits(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, route_timeout_s=0.3) as world:
        with_tight_middle(world, room(tiny_llama, 1))
        other = world.model.session()
        other.step(torch.zeros(1, 1, 32))
        with pytest.raises(NoRouteError, match=r"had no room for 0 s.*bytes"):
            world.answer()
        assert not world.client.bans.is_banned(world.swarm.servers[-1].peer_id)


def test_what_another_session_was_told_is_not_said_to_be_an_error_of_this_one(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, route_timeout_s=0.3) as world:
        world.answer(new_tokens=1)
        sessions = [world.server(one.peer_id).serving.sessions for one in world.swarm.servers]  # type: ignore[union-attr, arg-type]
        wait_until(lambda: not any(one.num_sessions for one in sessions), "the answer's session has ended")
        world.client.busy.note(next(iter(world.client.known.servers())).service_id, 60.0)
        with pytest.raises(NoRouteError, match=r"had no room for 0 s; start another server"):
            world.answer()


@pytest.mark.parametrize("push", [True, False])
def test_a_session_whose_idle_cache_made_room_for_others_goes_on_with_the_same_tokens(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], push: bool
) -> None:
    with a_world(tiny_llama, replicas=1, push=push) as world:
        with_tight_middle(world, room(tiny_llama, 1, evict_after_s=0))
        with world.model.session() as session:
            world.answer(new_tokens=2)
            assert_same(answer(world.swarm.model(), *prompt(7), new_tokens=NEW_TOKENS), undisturbed())
            assert_same(world.answer(), undisturbed())
            assert session.position
        assert world.lost() == []
        assert "room was needed" in world.events(PeerRefused)[0].reason


def test_a_session_goes_on_elsewhere_when_a_server_has_computed_enough_for_its_client(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama, replicas=1) as world:
        with_tight_middle(world, ServerSettings().replace(client_tokens_per_minute=8, throughput=10_000))
        world.add((1, 3))
        assert_same(world.answer(), undisturbed())
        assert world.lost() == []
        refused = world.events(PeerRefused)[0]
        assert "8 tokens a minute" in refused.reason
        assert refused.retry_after_s > 1
