"""A swarm whose servers are far away: everything to and from them passes their emulated links."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.errors import UsageError
from swarmkit.events import PeerLost
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net.emulation.link_schedule import EmulatedLink

from .client.answers import answer, at, prompt
from .models.tiny import make_checkpoint

DELAY_S = 0.02
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="in-process"),
        pytest.param(True, id="processes", marks=pytest.mark.slow),
    ],
)
def far_swarm(request: pytest.FixtureRequest, tiny: Checkpoint) -> Iterator[LocalSwarm]:
    with LocalSwarm(tiny, num_stages=2, processes=request.param, link=EmulatedLink(delay_s=DELAY_S)) as swarm:
        yield swarm


def carried(swarm: LocalSwarm) -> int:
    links = [swarm.link_of(server) for server in swarm.servers]
    return sum(link.inbound_bytes + link.outbound_bytes for link in links)


def test_a_far_swarm_gives_the_same_tokens(far_swarm: LocalSwarm, tiny: Checkpoint) -> None:
    tokens = answer(far_swarm.model(), prompt(5)[0])
    assert tokens.tolist() == answer(load_local(tiny), prompt(5)[0]).tolist()


def test_the_links_carry_the_tensors(far_swarm: LocalSwarm, tiny: Checkpoint) -> None:
    model = far_swarm.model()
    before = carried(far_swarm)
    answer(model, prompt(100)[0], new_tokens=1)
    hops = len(far_swarm.servers) + 1  # when each server sends straight to the next one; more otherwise
    assert (
        carried(far_swarm) - before >= hops * 100 * tiny.hidden_size * 2
    )  # bytes, in half precision at least


def test_a_step_takes_a_round_trip_at_least(far_swarm: LocalSwarm) -> None:
    model = far_swarm.model()
    answer(model, prompt(5)[0], new_tokens=NEW_TOKENS)
    assert min(step.total_ms for step in model.trace) >= 2 * DELAY_S * 1e3


def test_nobody_finds_a_way_around_the_links(far_swarm: LocalSwarm) -> None:
    """Whoever is connected to the port where a server really listens is the link, in this process."""
    model = far_swarm.model()
    answer(model, prompt(5)[0], new_tokens=NEW_TOKENS)
    model.connection.call(model.connection.client.known.refresh)
    hidden_ports = {far_swarm.link_of(server).target[1] for server in far_swarm.servers}
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = {
        (process.pid, link.raddr.port)
        for process in family
        for link in process.net_connections("tcp")
        if link.status == psutil.CONN_ESTABLISHED and link.raddr.port in hidden_ports
    }
    assert {pid for pid, _ in found} == {os.getpid()}
    assert {port for _, port in found} == hidden_ports


def test_only_the_links_addresses_are_announced(far_swarm: LocalSwarm) -> None:
    connection = far_swarm.model().connection
    connection.call(connection.client.known.refresh)
    announced = {
        address.rpartition("/p2p/")[0]
        for server in connection.client.known.view.announcements.values()
        for address in server.addresses
    }
    assert announced == {far_swarm.link_of(server).address for server in far_swarm.servers}


def test_a_cut_link_is_a_lost_server(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, num_stages=1, replicas=2, link=EmulatedLink()) as swarm:
        model = swarm.model()

        def cut() -> None:
            used = model.trace[-1].hops[0].peer_id
            swarm.link_of(next(s for s in swarm.servers if s.peer_id == used)).refuse()

        tokens = answer(model, prompt(5)[0], logits_processor=at({2: cut}))
        assert tokens.tolist() == answer(load_local(tiny), prompt(5)[0]).tolist()
        assert [type(event) for event in model.events if isinstance(event, PeerLost)] == [PeerLost]


def test_a_server_that_is_added_gets_a_link_of_its_own(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, num_stages=1, link=EmulatedLink(delay_s=DELAY_S)) as swarm:
        added = swarm.add_server()
        assert swarm.link_of(added) is not swarm.link_of(swarm.servers[0])


def test_a_swarm_without_links_says_so(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, transport="memory") as swarm, pytest.raises(UsageError, match="no links"):
        swarm.link_of(swarm.servers[0])


def test_the_memory_transport_has_links_of_its_own(tiny: Checkpoint) -> None:
    options: dict[str, Any] = {"transport": "memory", "link": EmulatedLink()}
    with pytest.raises(UsageError, match="set_link"):
        LocalSwarm(tiny, **options)
