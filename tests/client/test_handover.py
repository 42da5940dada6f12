"""A session goes on with the keys and values of a server that leaves: the tokens are those of a session that
was not disturbed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmkit import LocalSwarm
from swarmkit.client.routing import handover_choice
from swarmkit.events import KeysHandedOver, OutputsDiffered, PeerLost, PeerReplaced
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.handover_messages import KeysPiece
from swarmkit.node.server import Server
from swarmkit.server.sessions import handover
from swarmkit.settings import ClientSettings, ServerSettings

from ..waiting import wait_until
from .answers import answer, prompt
from .recovery import NEW_TOKENS, WAYS, World, a_world, assert_same

CLIENTS = 4
PATIENT = ServerSettings().replace(link_timeout_s=60.0)


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Checkpoint) -> Callable[..., Tensor]:
    local = load_local(tiny_llama)

    def tokens(way: str = "greedy") -> Tensor:
        lengths, how = WAYS[way]
        found: Tensor = answer(local, *prompt(*lengths), **{"new_tokens": NEW_TOKENS, **how})
        return found

    return tokens


@pytest.fixture(autouse=True)
def patient_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a while has no handover given up."""
    monkeypatch.setattr(handover_choice, "LEAST_PATIENCE_S", 100.0)


def moving_world(checkpoint: Checkpoint, replicas: int = 2, stages: int = 3, **options: Any) -> Any:
    return a_world(
        checkpoint, replicas, stages, **{"hand_over": "always", "server_settings": PATIENT, **options}
    )


@pytest.fixture
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    with moving_world(tiny_llama) as world:
        yield world


def leave(world: World, *stages: int) -> Callable[[], None]:
    """Have servers in use say that they leave; they serve until the test is over."""

    def say() -> None:
        for server in [world.in_use(stage) for stage in stages]:
            serving = server.serving
            assert serving is not None
            serving.sessions.leaving = True

    return lambda: world.on_loop(say)


def handover_of(server: Server) -> Any:
    assert server.serving is not None
    return server.serving.handover


@pytest.mark.parametrize(
    "way",
    [
        "greedy",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("left-padded batch", "prompt lookup")),
    ],
)
def test_the_tokens_are_the_same_and_nothing_is_replayed(
    world: World, undisturbed: Callable[..., Tensor], way: str
) -> None:
    assert_same(world.answer(way, {2: leave(world, 0, 1, 2)}), undisturbed(way))
    assert len(world.events(KeysHandedOver)) == 3
    assert [event.replayed_tokens for event in world.events(PeerReplaced)] == [0, 0, 0]


def test_the_event_says_what_went_from_where_to_where(world: World) -> None:
    world.answer(actions={2: leave(world, 1)})
    (event,) = world.events(KeysHandedOver)
    (lost,) = world.events(PeerLost)
    (replaced,) = world.events(PeerReplaced)
    assert (event.peer_id, (event.to_peer_id,)) == (lost.peer_id, replaced.replaced_by)
    assert (event.start, event.stop, event.owner.kind) == (1, 3, "session")
    assert 7 < event.tokens < 7 + NEW_TOKENS
    assert event.nbytes > 0


@pytest.mark.slow
def test_beams_that_share_pages_are_replayed(world: World, undisturbed: Callable[..., Tensor]) -> None:
    assert_same(world.answer("beams", {2: leave(world, 1)}), undisturbed("beams"))
    assert world.events(KeysHandedOver) == []
    assert len(world.events(PeerReplaced)) == 1


@pytest.mark.slow
def test_where_its_user_wants_no_handover_a_session_is_replayed(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with moving_world(tiny_llama, hand_over="never") as world:
        assert_same(world.answer(actions={2: leave(world, 1)}), undisturbed())
        assert world.events(KeysHandedOver) == []
        assert len(world.events(PeerReplaced)) == 1


def test_a_session_that_keeps_no_history_moves_all_the_same(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with moving_world(tiny_llama, hand_over="auto", recovery=False, prefix_cache_bytes=0) as world:
        assert_same(world.answer(actions={2: leave(world, 0, 1, 2)}), undisturbed())
        assert len(world.events(KeysHandedOver)) == 3


@pytest.mark.slow
def test_a_session_that_keeps_no_history_stays_where_it_cannot_be_handed_over(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor]
) -> None:
    with moving_world(tiny_llama, recovery=False, prefix_cache_bytes=0, hand_over="never") as world:
        assert_same(world.answer(actions={2: leave(world, 1)}), undisturbed())
        assert world.lost() == []


def test_whatever_goes_wrong_the_session_is_replayed(
    world: World, undisturbed: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*args: object) -> None:
        raise RuntimeError("a bug")

    for server in world.swarm.servers:
        assert isinstance(server, Server)
        monkeypatch.setattr(handover_of(server), "take", fails)
    assert_same(world.answer(actions={2: leave(world, 1)}), undisturbed())
    assert world.events(KeysHandedOver) == []
    assert len(world.events(PeerReplaced)) == 1


def test_a_server_that_only_says_that_it_took_everything_is_left_aside(
    tiny_llama: Checkpoint, undisturbed: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lies(caller: Any, awaited: Any) -> None:
        awaited.taken = awaited.tokens
        for _ in range(2):
            await (await caller.next()).payload()

    with moving_world(tiny_llama, replicas=3) as world:
        for server in world.swarm.servers:
            assert isinstance(server, Server)
            monkeypatch.setattr(handover_of(server), "take", lies)
        assert_same(world.answer(actions={2: leave(world, 1)}), undisturbed())
        (event,) = world.events(KeysHandedOver)
        assert event.to_peer_id in world.lost()


@pytest.mark.slow
def test_who_goes_on_with_false_keys_of_another_is_not_blamed_for_them(
    tiny_llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, long = load_local(tiny_llama), prompt(40)[0]
    with moving_world(tiny_llama, 4, 2, check_share=1.0) as world, world.model.session():
        said = answer(world.model, long, new_tokens=2)
        monkeypatch.setattr(handover, "encoded_piece", half_of_it)
        leave(world, 0)()

        def is_told() -> bool:
            world.model.generate(
                said, attention_mask=torch.ones_like(said), max_new_tokens=1, do_sample=False
            )
            return world.events(OutputsDiffered) != []

        wait_until(is_told, "a difference is told")
        assert len(world.events(KeysHandedOver)) == 1
        text = torch.cat([said, long[:, :4]], dim=1)
        assert_same(answer(world.model, text, new_tokens=4), answer(local, text, new_tokens=4))
        assert world.client.bans.convicted == {}


def half_of_it(session: Any, piece: KeysPiece) -> Callable[[], Any]:
    """What a liar brings in the place of keys and values."""
    return lambda: tuple(
        codec.encode(part * 0.5) for part in session.cache.states(piece.block, piece.low, piece.high)
    )


def replacements(model: Any) -> list[PeerReplaced]:
    return [event for event in model.events if isinstance(event, PeerReplaced)]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_process_that_drains_under_load_drops_nothing(
    tiny_llama: Checkpoint, kept_fork_server: None
) -> None:
    local = load_local(tiny_llama)
    settings = ClientSettings().replace(
        hand_over="always", ban_s=60, min_step_timeout_s=60, untried_wait_s=60
    )
    prompts = [prompt(100, seed=number)[0] for number in range(CLIENTS)]
    wanted = [answer(local, ids, new_tokens=NEW_TOKENS).tolist() for ids in prompts]
    with LocalSwarm(
        tiny_llama, 2, 2, processes=True, client_settings=settings, server_settings=PATIENT
    ) as swarm:
        models = [swarm.model() for _ in range(CLIENTS)]
        all_run = threading.Barrier(CLIENTS + 1, timeout=120)
        leaving: list[str] = []

        def talk(number: int) -> list[Any]:
            model, ids = models[number], prompts[number]
            with model.session() as session:
                found = [answer(model, ids, new_tokens=NEW_TOKENS)]
                all_run.wait()  # all know a route
                all_run.wait()  # a server is told to leave
                while leaving[0] in [hop.server.peer_id for hop in session.chain.route]:
                    found.append(answer(model, ids, new_tokens=NEW_TOKENS))
                found.append(answer(model, ids, new_tokens=NEW_TOKENS))
            return found

        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            talks = [pool.submit(talk, number) for number in range(CLIENTS)]
            all_run.wait()
            peer_id = models[0].connection.client.trace[-1].hops[0].peer_id
            (server,) = [one for one in swarm.servers if one.peer_id == peer_id]
            leaving.append(peer_id)
            stopped = pool.submit(server.stop, 600.0)
            all_run.wait()
            for number, talked in enumerate(talks):
                for tokens in talked.result(timeout=150):
                    assert tokens.tolist() == wanted[number]
            stopped.result(timeout=60)  # it did not have to wait for its time to be over
        lost = [event for model in models for event in model.events if isinstance(event, PeerLost)]
        handed = [event for model in models for event in model.events if isinstance(event, KeysHandedOver)]
        assert {event.reason for event in lost} == {"is leaving"}
        assert {event.peer_id for event in handed} == {peer_id}
        assert [event.replayed_tokens for model in models for event in replacements(model)] == [0] * len(lost)
