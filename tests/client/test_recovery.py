"""Servers fail in every way and at every moment, and the tokens stay what they would have been.

In process, over the memory transport, whose faults are programmed. `test_kill_processes` does some of this to
real processes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

from swarmkit.client.session.replica import StageReplica
from swarmkit.client.session.session import Session
from swarmkit.errors import NoRouteError, PeerUnreachableError
from swarmkit.events import (
    PeerLost,
    PeerRefused,
    PeerReplaced,
    Rerouted,
    RoutePlanned,
    WaitStarted,
    following,
)
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.models.plan import cache_cost
from swarmkit.node.server import Server
from swarmkit.settings import ServerSettings

from ..waiting import wait_until
from .answers import answer, prompt
from .recovery import NEW_TOKENS, STAGES, WAYS, World, a_world, assert_same

BOTH_WAYS = [
    pytest.param(True, id="server-to-server"),
    pytest.param(False, id="through-the-client", marks=pytest.mark.slow),
]


def some_slowly(*names: str, fast: set[tuple[Any, ...]], of: Iterable[tuple[Any, ...]]) -> Any:
    """Cases of which a few stand for all each time, and the others are left to the slow tests."""
    cases = [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in of]
    return pytest.mark.parametrize(names, cases)


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Checkpoint) -> Callable[..., Tensor]:
    """What the local model answers."""
    local = load_local(tiny_llama)

    def tokens(way: str = "greedy", **options: Any) -> Tensor:
        lengths, how = WAYS[way]
        return answer(local, *prompt(*lengths), **{"new_tokens": NEW_TOKENS, **how, **options})  # type: ignore

    return tokens


@pytest.fixture(scope="module", params=BOTH_WAYS)
def shared(tiny_llama: Checkpoint, request: pytest.FixtureRequest) -> Iterator[World]:
    """A swarm for many kills; whoever kills a server brings another one."""
    with a_world(tiny_llama, push=request.param) as world:
        yield world


@some_slowly(
    "stage",
    "tokens",
    fast={(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (1, 3), (0, NEW_TOKENS - 1), (2, NEW_TOKENS - 1)},
    of=itertools.product(range(3), range(NEW_TOKENS)),
)
def test_a_server_that_dies_at_any_step_is_replaced(
    shared: World, undisturbed: Callable[..., Tensor], stage: int, tokens: int
) -> None:
    killed: list[str] = []

    def kill() -> None:
        server = shared.in_use(stage)
        killed.append(server.peer_id)
        server.kill()

    shared.add(STAGES[stage])
    if tokens == 0:  # before the prefill: the client does not know yet that it died
        shared.answer(new_tokens=1)
        kill()
        found = shared.answer()
    else:
        found = shared.answer(actions={tokens - 1: kill})
    assert_same(found, undisturbed())
    assert shared.lost()[-1] == killed[0]
    if tokens:
        assert shared.events(PeerReplaced)[-1].replayed_tokens == 7 + tokens - 1
        assert [step.recovered for step in shared.model.trace[-NEW_TOKENS + tokens :]].count(True) == 1


@some_slowly(
    "stage",
    "way",
    fast={(1, way) for way in WAYS} | {(0, "beams"), (2, "left-padded batch")},
    of=itertools.product(range(3), WAYS),
)
def test_a_death_in_the_middle_of_every_way_to_generate(
    shared: World, undisturbed: Callable[..., Tensor], way: str, stage: int
) -> None:
    shared.add(STAGES[stage])
    before = len(shared.events(PeerReplaced))
    actions = {1: lambda: shared.in_use(stage).kill()}
    if way == "prompt lookup":
        actions = {0: lambda: shared.in_use(stage).kill()}  # it may see several tokens at once
    assert_same(shared.answer(way, actions), undisturbed(way))
    assert len(shared.events(PeerReplaced)) == before + 1


@some_slowly(
    "stages",
    "way",
    fast={
        ((0, 1), "greedy"),
        ((1, 2), "left-padded batch"),
        ((0, 2), "beams"),
        ((0, 1, 2), "greedy"),
        ((0, 1, 2), "beams"),
    },
    of=itertools.product(
        [(0, 1), (1, 2), (0, 2), (0, 1, 2)],
        ["greedy", "beams", "left-padded batch"],
    ),
)
def test_several_stages_that_die_at_once(
    shared: World, undisturbed: Callable[..., Tensor], stages: tuple[int, ...], way: str
) -> None:
    shared.add(*(STAGES[stage] for stage in stages))

    def kill() -> None:
        for server in [shared.in_use(stage) for stage in stages]:
            server.kill()

    before = len(shared.lost())
    assert_same(shared.answer(way, {2: kill}), undisturbed(way))
    assert len(shared.lost()) == before + len(stages)


def test_a_new_server_dies_at_every_token(shared: World, undisturbed: Callable[..., Tensor]) -> None:
    def kill_and_replace(stage: int) -> Callable[[], None]:
        def act() -> None:
            shared.in_use(stage).kill()
            shared.add(STAGES[stage])

        return act

    actions = {tokens: kill_and_replace(tokens % 3) for tokens in range(5)}
    assert_same(shared.answer(actions=actions), undisturbed())


def test_a_session_survives_between_two_generates(shared: World, undisturbed: Callable[..., Tensor]) -> None:
    shared.add(*STAGES)
    with shared.model.session():
        shared.answer(new_tokens=3)
        for stage in range(3):
            shared.in_use(stage).kill()
        assert_same(shared.answer(), undisturbed())


def test_an_edit_before_a_death_is_not_lost(shared: World) -> None:
    """Cropped and reordered while the server that held the rows is dead already."""
    shared.add(*STAGES)
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(2, 10, 32, generator=generator)
    new = torch.randn(3, 2, 32, generator=generator)
    for stage in range(3):
        shared.add(STAGES[stage])
        with shared.model.session() as session, shared.model.session() as fresh:
            session.step(old)
            session.reorder([1, 0, 1])
            session.crop(8)
            shared.in_use(stage).kill()
            output = session.step(new)
            wanted = fresh.step(torch.cat([old[[1, 0, 1], :8], new], dim=1))[:, 8:]
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


# replacements with other boundaries


OTHERS = {
    "split in two": [(1, 2), (2, 4)],
    "one block each": [(1, 2), (2, 3), (3, 4)],
    "wider": [(0, 5)],
    "overlapping": [(0, 3), (2, 5)],
    "wider and narrower": [(1, 3), (0, 5)],
}


@some_slowly(
    "others",
    "way",
    "tokens",
    fast={(name, "greedy", 3) for name in OTHERS} | {("split in two", "greedy", 0), ("wider", "greedy", 0)},
    of=itertools.product(OTHERS, ["greedy", "beams", "left-padded batch"], [0, 3]),
)
def test_a_replacement_may_have_other_boundaries(
    tiny_llama: Checkpoint,
    undisturbed: Callable[..., Tensor],
    others: str,
    way: str,
    tokens: int,
) -> None:
    with a_world(
        tiny_llama, replicas=1, stages=1, server_settings=ServerSettings().replace(max_step_tokens=6)
    ) as world:
        world.swarm.servers[0].stop()
        world.add((0, 1), (1, 4), (4, 5))

        def exchange() -> None:
            world.in_use(1).kill()
            world.add(*OTHERS[others])

        assert_same(world.answer(way, {tokens: exchange}), undisturbed(way))
        replaced = world.events(PeerReplaced)[-1]
        assert {server.peer_id for server in world.swarm.servers[4:]} & set(replaced.replaced_by)
        covered = [hop for hop in world.client.trace[-1].hops if hop.stop > 1 and hop.start < 4]
        assert (covered[0].start, covered[-1].stop) == (1, 4)
        assert all(one.stop == next_one.start for one, next_one in itertools.pairwise(covered))


def test_parts_of_a_split_stage_die_too(tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]) -> None:
    """A stage that came into being in the middle has a history of its own afterwards."""
    with a_world(tiny_llama, replicas=1, stages=1) as world:

        def split() -> None:
            world.swarm.servers[0].kill()
            world.add((0, 2), (2, 5))

        def split_again() -> None:
            world.in_use(1).kill()
            world.add((2, 3), (3, 5))

        def join() -> None:
            world.in_use(2).kill()
            world.in_use(0).kill()
            world.add((0, 5))

        assert_same(world.answer(actions={1: split, 2: split_again, 3: join}), undisturbed())
        assert len(world.events(PeerReplaced)) == 4


# nobody is left


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_all_replicas_are_gone_and_one_comes_back(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], way: str
) -> None:
    with a_world(tiny_llama, replicas=2) as world:

        def kill_all() -> None:
            for server in world.swarm.servers:
                if server.blocks == (1, 3):
                    server.kill()

        with following(world.client.events, lambda event: world.swarm.add_server((1, 3)), WaitStarted):
            assert_same(world.answer(way, {2: kill_all}), undisturbed(way))
        assert [event.missing for event in world.events(WaitStarted)] == [((1, 3),)]


def test_nobody_comes_back_and_the_error_names_the_blocks(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama, replicas=1, route_timeout_s=0.2) as world, world.model.session():
        with pytest.raises(NoRouteError, match="blocks 1:3") as caught:
            world.answer(actions={2: lambda: world.in_use(1).kill()})
        assert caught.value.missing == ((1, 3),)
        world.add((1, 3))
        assert_same(world.answer(), undisturbed())  # in the same session


def test_a_swarm_that_was_never_whole(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, route_timeout_s=0.1) as world:
        for server in world.swarm.servers[1:]:
            server.stop()
        world.look()
        with pytest.raises(NoRouteError, match="blocks 1:5"):
            world.answer()


def test_servers_that_always_fail_are_given_up(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, route_timeout_s=0.3) as world:
        for server in world.swarm.servers:
            world.network.set_link(world.client.peer_id, server.peer_id, fail_rate=1.0)
        with pytest.raises(NoRouteError, match="kept failing"):
            world.answer()


def test_route_timeout_is_counted_from_the_loss_and_not_from_the_beginning_of_the_step(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may take longer than `route_timeout_s`: the clock of the search starts with the loss."""
    with a_world(tiny_llama, replicas=1, route_timeout_s=3.0) as world:
        send = StageReplica.send

        async def slow_first_stage(stage: StageReplica, *rest: Any) -> None:
            if stage.hop.start == 0:
                await anyio.sleep(3.2)
                await anyio.to_thread.run_sync(world.swarm.servers[1].kill)
            await send(stage, *rest)

        monkeypatch.setattr(StageReplica, "send", slow_first_stage)
        with following(world.client.events, lambda event: world.add((1, 3)), PeerLost):
            assert_same(world.answer(new_tokens=1), undisturbed(new_tokens=1))


# sends that fail


@pytest.fixture(scope="module", params=BOTH_WAYS)
def lossy(tiny_llama: Checkpoint, request: pytest.FixtureRequest) -> Iterator[World]:
    with a_world(tiny_llama, ban_s=0.001, max_ban_s=0.01, push=request.param) as world:
        yield world


@some_slowly(
    "seed",
    "fail_rate",
    fast={(0, 0.03), *((seed, 0.2) for seed in range(len(WAYS)))},
    of=itertools.product(range(15), [0.03, 0.2]),
)
def test_every_send_may_fail(
    lossy: World, undisturbed: Callable[..., Tensor], seed: int, fail_rate: float
) -> None:
    lossy.network.seed(seed)
    for server in lossy.swarm.servers:
        lossy.network.set_link(lossy.client.peer_id, server.peer_id, fail_rate=fail_rate)
    way = list(WAYS)[seed % len(WAYS)]
    assert_same(lossy.answer(way), undisturbed(way))


# silence


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_server_that_hangs_is_left_after_the_deadline(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], stage: int
) -> None:
    with a_world(tiny_llama, min_step_timeout_s=0.3) as world:
        hung: list[str] = []

        def hang() -> None:
            hung.append(world.in_use(stage).peer_id)
            world.hang(world.in_use(stage))

        assert_same(world.answer(actions={2: hang}), undisturbed())
        lost = {event.peer_id: event.reason for event in world.events(PeerLost)}
        assert "silent" in lost[hung[0]]
        world.on_loop(lambda: world.network.resume(hung[0]))
        assert_same(world.answer(), undisturbed())


def test_a_replacement_that_hangs_while_it_is_opened_is_left_too(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_world(tiny_llama, replicas=3, min_step_timeout_s=0.3) as world:
        world.client.net_settings = world.client.net_settings.replace(connect_timeout_s=0.3)

        def break_two() -> None:
            world.in_use(1).kill()
            best = world.client.routes.plan(1, 3, without=frozenset({world.in_use(1).peer_id}))
            world.hang(world.server(best[0].server.peer_id))

        assert_same(world.answer(actions={2: break_two}), undisturbed())
        assert len(world.lost()) >= 2


# leaving


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_session_moves_away_from_a_server_that_leaves(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], stage: int
) -> None:
    with a_world(tiny_llama) as world, ThreadPoolExecutor() as pool:
        left: list[Any] = []

        def leave() -> None:
            server = world.in_use(stage)
            left.append((server.peer_id, pool.submit(server.stop, 600.0)))
            service = server.serving.sessions
            wait_until(lambda: service is not None and service.leaving, "it leaves")

        assert_same(world.answer(actions={1: leave}), undisturbed())
        (peer_id, stopped) = left[0]
        stopped.result(timeout=60)  # it did not have to wait for its time to be over
        assert [(event.peer_id, event.reason) for event in world.events(PeerLost)] == [
            (peer_id, "is leaving")
        ]
        assert not world.client.bans.is_banned(peer_id)


def test_a_session_stays_with_a_server_that_leaves_while_nobody_else_has_the_blocks(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama, replicas=1) as world, ThreadPoolExecutor() as pool:
        stopped = []

        def leave() -> None:
            server = world.in_use(1)
            stopped.append(pool.submit(server.stop, 600.0))
            service = server.serving.sessions
            wait_until(lambda: service is not None and service.leaving, "it leaves")

        assert_same(world.answer(actions={1: leave}), undisturbed())
        stopped[0].result(timeout=60)
        assert world.lost() == []


def test_a_newcomer_is_found_while_a_server_leaves(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama, replicas=1) as world, ThreadPoolExecutor() as pool:
        new: list[str] = []
        stopped, old = [], world.swarm.servers[1].peer_id

        def leave() -> None:
            server = world.in_use(1)
            stopped.append(pool.submit(server.stop, 600.0))
            service = server.serving.sessions
            wait_until(lambda: service is not None and service.leaving, "it leaves")

        def newcomer() -> None:
            new.append(world.swarm.add_server((1, 3)).peer_id)

        def found() -> None:
            wait_until(
                lambda: new[0] in world.client.known.view.announcements, "the client looks around by itself"
            )

        actions = {1: leave, 3: newcomer, 4: found}
        assert_same(world.answer(actions=actions, new_tokens=8), undisturbed(new_tokens=8))
        stopped[0].result(timeout=60)
        assert world.lost() == [old]


# busy


def test_a_server_without_room_for_a_session_is_passed_by(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama, server_settings=ServerSettings().replace(max_sessions=1)) as world:
        first = world.model.session()
        first.step(torch.zeros(1, 1, 32))
        world.client.routes.times.clear()  # so that the next session would choose the same servers
        assert_same(world.answer(), undisturbed())
        assert len(first.route) == 3
        assert world.lost() == []
        assert all("sessions are open" in event.reason for event in world.events(PeerRefused))
        assert {event.peer_id for event in world.events(PeerRefused)} == {
            event.peer_id for event in world.events(Rerouted)
        }


def test_a_session_that_outgrows_a_server_moves_on(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    room = 32 * 2 * cache_cost(tiny_llama, torch.float32).token_bytes
    with a_world(tiny_llama, replicas=1) as world:
        world.swarm.servers[1].stop()
        world.add((1, 3), settings=ServerSettings().replace(cache_bytes=room, prefix_cache="off"))

        def more_room() -> None:
            world.add((1, 3))

        tokens = world.answer(actions={1: more_room}, new_tokens=30)
        assert_same(tokens, undisturbed(new_tokens=30))
        assert world.lost() == []
        assert [event.replayed_tokens for event in world.events(Rerouted)] == [32]


# a replay that is disturbed itself


@pytest.mark.parametrize(
    "way", ["greedy", "beams", pytest.param("left-padded batch", marks=pytest.mark.slow)]
)
def test_a_replacement_that_dies_during_the_replay(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], way: str
) -> None:
    with a_world(
        tiny_llama, replicas=3, server_settings=ServerSettings().replace(max_step_tokens=6)
    ) as world:
        victims: list[str] = []

        def die_in_a_replay(server: Server) -> None:
            engine = server.serving.engine
            compute, steps = engine.step, itertools.count()

            async def step(*args: Any) -> Any:
                if not victims and next(steps) == 1:  # the replay takes several steps
                    victims.append(server.peer_id)
                    server.node.crash()
                return await compute(*args)

            engine.step = step  # type: ignore[method-assign]

        def kill() -> None:
            used = world.in_use(1)
            for server in world.swarm.servers:
                if server.blocks == (1, 3) and server is not used:
                    assert isinstance(server, Server)
                    die_in_a_replay(server)
            used.kill()

        assert_same(world.answer(way, {3: kill}), undisturbed(way))
        assert len(victims) == 1
        assert len(world.lost()) == 2
        assert world.lost()[1] == victims[0]


# the search for others


@contextmanager
def a_world_with_a_slow_server(checkpoint: Checkpoint) -> Iterator[World]:
    """A server, another one that says it is slow, and a client that bans for a moment only."""
    settings = ServerSettings().replace(announce_period_s=0.05)
    with a_world(checkpoint, replicas=1, stages=1, ban_s=1e-6, server_settings=settings) as world:
        world.add((0, 5), settings=settings.replace(throughput=1.0))
        yield world


def would_use(world: World) -> str:
    (hop,) = world.client.routes.plan(0, 5)
    return hop.server.peer_id


def test_a_server_that_was_lost_is_used_last_when_its_ban_has_ended(tiny_llama: Checkpoint) -> None:
    with a_world_with_a_slow_server(tiny_llama) as world:
        lost, slow = (server.peer_id for server in world.swarm.servers)
        assert would_use(world) == lost
        world.answer(actions={2: world.server(lost).kill})
        world.look()
        world.look()
        assert not world.client.bans.is_banned(lost)
        assert would_use(world) == slow


def test_a_server_that_was_lost_is_used_again_when_it_has_announced_itself(tiny_llama: Checkpoint) -> None:
    with a_world_with_a_slow_server(tiny_llama) as world:
        there, _ = (server.peer_id for server in world.swarm.servers)
        world.on_loop(lambda: world.client.ban(there, PeerUnreachableError("the connection was lost")))
        assert would_use(world) != there
        wait_until(lambda: (world.look(), would_use(world) == there)[1], "it has announced itself anew")


def test_known_replicas_are_used_without_a_look_at_the_table(
    shared: World, undisturbed: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With peers gone a look at the shared table may take seconds, in which nobody should have to wait."""
    shared.add(*STAGES)

    async def never() -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(shared.client.known, "refresh", never)
    actions = {tokens: lambda stage=tokens: shared.in_use(stage).kill() for tokens in range(3)}
    assert_same(shared.answer(actions=actions), undisturbed())


def test_sessions_that_search_at_the_same_time_share_one_look(shared: World) -> None:
    async def look_together() -> int:
        client = shared.client
        looks = client.known.looks
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(client.known.refresh)
        return client.known.looks - looks

    # If the first look had begun before the others asked, one more is due, for all of them.
    assert shared.model.connection.call(look_together) <= 2


def test_one_crash_bans_a_peer_once_however_many_sessions_met_it(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama, ban_s=2, max_ban_s=1000) as world:
        sessions: list[Session] = [world.model.session() for _ in range(8)]
        for session in sessions:
            session.step(torch.zeros(1, 2, 32))
        world.in_use(1).kill()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda session: session.step(torch.zeros(1, 1, 32)), sessions))
        assert len(world.lost()) == 8
        assert {failures.count for failures in world.client.bans.failures.values()} == {1}


def test_the_events_of_a_recovery_tell_what_happened(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with a_world(tiny_llama) as world:
        killed: list[Server] = []

        def kill() -> None:
            killed.append(world.in_use(1))
            killed[0].kill()

        with world.model.subscribe(8, RoutePlanned, PeerLost, PeerReplaced) as subscription:
            world.answer(actions={2: kill})
        planned, lost, replaced = subscription.pending()
        assert isinstance(planned, RoutePlanned)
        assert len(planned.route) == 3
        assert isinstance(lost, PeerLost)
        assert isinstance(replaced, PeerReplaced)
        assert (lost.start, lost.stop, lost.reason) == (1, 3, "connection lost")
        assert lost.peer_id == replaced.peer_id == killed[0].peer_id
        assert replaced.replaced_by == (world.in_use(1).peer_id,)
        assert replaced.replayed_tokens == 7 + 2


# many at once


def test_threads_whose_servers_die_under_them(shared: World, undisturbed: Callable[..., Tensor]) -> None:
    shared.add(*STAGES)
    ready = threading.Barrier(4, action=lambda: [shared.in_use(stage).kill() for stage in range(3)])

    def talk(way: str) -> Tensor:
        return shared.answer(way, {2: lambda: ready.wait(60)})

    ways = ["greedy", "beams", "left-padded batch", "greedy"]
    with ThreadPoolExecutor(4) as pool:
        for way, tokens in zip(ways, pool.map(talk, ways), strict=True):
            assert_same(tokens, undisturbed(way))
