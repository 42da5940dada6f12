"""A server that moves to other blocks while clients decode: their tokens stay the same, nothing is left."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import Tensor

from swarmkit import LocalSwarm
from swarmkit.errors import UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import load_local
from swarmkit.node.server import Server
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ClientSettings, ServerSettings

from ..client.answers import answer, prompt
from ..models.tiny import make_checkpoint
from ..waiting import wait_until

CLIENTS = 8
HERE, THERE = (0, 4), (4, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("moves"), "llama", num_blocks=8))


def swarm_of(model: Checkpoint | str) -> LocalSwarm:
    """Replicas of both halves, beside which a server may move."""
    return LocalSwarm(
        model,
        num_stages=2,
        transport="memory",
        server_settings=ServerSettings().replace(drain_timeout_s=60),
        client_settings=ClientSettings().replace(min_step_timeout_s=60, refresh_period_s=0.05),
    )


@pytest.fixture
def swarm(checkpoint: Checkpoint) -> Iterator[LocalSwarm]:
    with swarm_of(checkpoint) as swarm:
        yield swarm


def mover_in(swarm: LocalSwarm, **options: Any) -> Server:
    server = swarm.add_server(HERE, **options)
    assert isinstance(server, Server)
    return server


def blocks_seen(swarm: LocalSwarm, server: Server) -> list[tuple[int, int]]:
    """The blocks that a client finds a server to serve."""
    connection = swarm.model().connection
    return [
        (one.start, one.stop)
        for one in connection.call(connection.client.known.look)
        if one.peer_id == server.peer_id
    ]


def test_a_server_that_moved_is_found_with_its_new_blocks_only(swarm: LocalSwarm) -> None:
    mover = mover_in(swarm)
    mover.move(THERE)
    assert mover.blocks == THERE
    wait_until(lambda: blocks_seen(swarm, mover) == [THERE], "clients find the new blocks")


def test_a_server_that_moved_serves_its_new_blocks(checkpoint: Checkpoint, swarm: LocalSwarm) -> None:
    mover = mover_in(swarm)
    mover.move(THERE)
    for server in swarm.servers[:2]:
        if server.blocks == THERE:
            server.kill()
    tokens = answer(swarm.model(), prompt(5)[0], new_tokens=4)
    assert tokens.tolist() == answer(load_local(checkpoint), prompt(5)[0], new_tokens=4).tolist()
    assert mover.serving is not None
    assert mover.serving.sessions.steps > 0


def test_a_move_to_the_blocks_that_are_served_does_nothing(swarm: LocalSwarm) -> None:
    mover = mover_in(swarm)
    serving = mover.serving
    mover.move(HERE)
    assert mover.serving is serving


def test_a_server_does_not_move_outside_the_model(swarm: LocalSwarm) -> None:
    mover = mover_in(swarm)
    with pytest.raises(UsageError, match="0:8"):
        mover.move((4, 9))
    assert mover.blocks == HERE


def test_a_server_that_was_stopped_does_not_move(swarm: LocalSwarm) -> None:
    mover = mover_in(swarm)
    mover.stop(0.0)
    with pytest.raises(UsageError):
        mover.move(THERE)


def test_a_move_that_fails_leaves_the_old_blocks_served(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = mover_in(swarm)

    def fails(*args: object, **options: object) -> Stage:
        raise MemoryError("too little")

    monkeypatch.setattr(Stage, "load", fails)
    with pytest.raises(MemoryError):
        mover.move(THERE)
    assert mover.blocks == HERE
    assert blocks_seen(swarm, mover) == [HERE]


@pytest.mark.parametrize(("memory_bytes", "fits"), [(2**40, True), (2**20, False)])
def test_whether_there_is_room_for_both_follows_the_memory_to_plan_with(
    checkpoint: Checkpoint, memory_bytes: int, fits: bool
) -> None:
    assert ServerConfig(checkpoint, memory_bytes=memory_bytes).fits_beside(HERE, THERE) is fits


def test_without_room_for_both_the_old_blocks_go_first(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerConfig, "fits_beside", lambda *_: False)
    mover = mover_in(swarm)
    assert mover.serving is not None
    old = weakref.ref(mover.serving.stage)
    held_at_load = []
    load = Stage.load

    def watched(*args: Any, **options: Any) -> Stage:
        gc.collect()
        held_at_load.append(old())
        return load(*args, **options)

    monkeypatch.setattr(Stage, "load", watched)
    mover.move(THERE)
    assert mover.blocks == THERE
    assert held_at_load == [None]


def test_a_server_may_be_stopped_while_old_blocks_drain(swarm: LocalSwarm) -> None:
    mover = mover_in(swarm)
    with swarm.model().session() as session:
        answer(swarm.model(), prompt(5)[0], session=session, new_tokens=1)
        mover.move(THERE)
        mover.stop(0.0)
    assert mover.serving is None or mover.serving.sessions.leaving


@pytest.mark.parametrize(
    ("model", "rounds"),
    [
        ("tiny", 2),
        pytest.param("tiny", 10, marks=pytest.mark.slow),
        pytest.param("tiny-chat", 10, marks=pytest.mark.slow),
    ],
)
def test_clients_that_decode_meanwhile_get_the_tokens_that_they_get_alone(
    checkpoint: Checkpoint, model: str, rounds: int
) -> None:
    with swarm_of(checkpoint if model == "tiny" else model) as swarm:
        local = load_local(swarm.checkpoint)
        mover, clients = mover_in(swarm), [swarm.model() for _ in range(CLIENTS)]
        prompts = [prompt(3 + 2 * number, seed=number)[0] for number in range(CLIENTS)]
        wanted = [answer(local, ids, new_tokens=12).tolist() for ids in prompts]
        moved, all_run = threading.Event(), threading.Barrier(CLIENTS + 1, timeout=60)

        def talk(number: int) -> list[Tensor]:
            found = [answer(clients[number], prompts[number], new_tokens=12)]
            all_run.wait()
            while not moved.is_set():
                found.append(answer(clients[number], prompts[number], new_tokens=12))
            return found

        stages = []
        with ThreadPoolExecutor(CLIENTS) as pool:
            talks = [pool.submit(talk, number) for number in range(CLIENTS)]
            all_run.wait()
            try:
                for _ in range(rounds):
                    for blocks in (THERE, HERE):
                        assert mover.serving is not None
                        stages.append(weakref.ref(mover.serving.stage))
                        mover.move(blocks)
            finally:
                moved.set()
            for number, talked in enumerate(talks):
                for tokens in talked.result():
                    assert tokens.tolist() == wanted[number]

        def left() -> list[object]:
            gc.collect()
            return [stage() for stage in stages if stage() is not None]

        wait_until(lambda: left() == [], "the stages of old blocks are gone")
        assert mover.serving is not None
        mover.serving.sessions.audit()
        wait_until(lambda: mover.serving.sessions.num_sessions == 0, "no session is left")  # type: ignore[union-attr]
        assert mover.serving.sessions.budget.leased_bytes == 0
