"""A client keeps streams to the servers that it would use next, and a session takes them over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.local.server_process import ServerProcess
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.node.server import Server
from swarmkit.settings import ClientSettings

from ..waiting import wait_until
from .answers import answer, prompt


@pytest.fixture
def swarm(tiny_llama: Checkpoint) -> Iterator[LocalSwarm]:
    settings = ClientSettings().replace(refresh_period_s=0.05)
    with LocalSwarm(tiny_llama, 2, 2, transport="memory", client_settings=settings) as swarm:
        yield swarm


def kept(model: SwarmModelForCausalLM) -> frozenset[str]:
    return model.connection.client.spares.kept


def servers_of(swarm: LocalSwarm, model: SwarmModelForCausalLM) -> tuple[set[str], set[str]]:
    """Those that the last step used, and the others."""
    used = {hop.peer_id for hop in model.trace[-1].hops}
    return used, {server.peer_id for server in swarm.servers} - used


def test_the_other_servers_of_all_blocks_are_kept_warm(swarm: LocalSwarm) -> None:
    model = swarm.model()
    answer(model, prompt(5)[0], new_tokens=2)
    _, others = servers_of(swarm, model)
    wait_until(lambda: kept(model) == others, "both other servers are spares")


def test_nothing_is_kept_before_a_session(swarm: LocalSwarm) -> None:
    model, served = swarm.model(), swarm.model()
    answer(served, prompt(5)[0], new_tokens=2)
    wait_until(lambda: bool(kept(served)), "the client with a session has spares")
    assert kept(model) == frozenset()


def test_how_far_a_spare_is_becomes_known(swarm: LocalSwarm) -> None:
    model = swarm.model()
    answer(model, prompt(5)[0], new_tokens=2)
    _, others = servers_of(swarm, model)
    wait_until(lambda: kept(model) == others, "both other servers are spares")
    client = model.connection.client
    assert all(0 < client.routes.way_s(name) != client.routes.way_s("unknown") for name in others)


def test_a_session_that_loses_its_server_takes_over_the_spare(swarm: LocalSwarm) -> None:
    model = swarm.model()
    with model.session() as session:
        answer(model, prompt(5)[0], session=session, new_tokens=2)
        _, others = servers_of(swarm, model)
        wait_until(lambda: kept(model) == others, "both other servers are spares")
        client = model.connection.client
        dialled: list[str] = []
        open_stream = client.transport.open

        async def opening(peer_id: str, *args: object) -> object:
            dialled.append(peer_id)
            return await open_stream(peer_id, *args)  # type: ignore[arg-type]

        client.transport.open = opening  # type: ignore[method-assign,assignment]
        client.spares.period_s = 3600.0
        lost = next(server for server in swarm.servers if server.peer_id == model.trace[-1].hops[0].peer_id)
        lost.kill()
        session.step(torch.zeros(1, 1, model.config.hidden_size))
        assert model.trace[-1].hops[0].peer_id in others
        assert model.trace[-1].hops[0].peer_id not in dialled


def test_a_spare_that_is_gone_is_not_kept(swarm: LocalSwarm) -> None:
    model = swarm.model()
    answer(model, prompt(5)[0], new_tokens=2)
    _, others = servers_of(swarm, model)
    wait_until(lambda: kept(model) == others, "both other servers are spares")
    gone = next(server for server in swarm.servers if server.peer_id in others)
    assert not isinstance(gone, ServerProcess)
    gone.kill()
    wait_until(lambda: gone.peer_id not in kept(model), "the spare that is gone is forgotten")


def test_spares_can_be_turned_off(tiny_llama: Checkpoint) -> None:
    settings = ClientSettings().replace(refresh_period_s=0.02, spares=False)
    with LocalSwarm(tiny_llama, 1, 2, transport="memory", client_settings=settings) as swarm:
        model = swarm.model()
        answer(model, prompt(5)[0], new_tokens=2)
        server = swarm.servers[0]
        assert isinstance(server, Server)
        wait_until(lambda: model.connection.client.known.looks > 4, "several periods have passed")
        assert kept(model) == frozenset()
