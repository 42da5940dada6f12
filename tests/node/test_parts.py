"""One process that serves two models and uses a third is one peer, with one connection to the swarm."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.errors import NotServedError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.connect import joined, over_hivemind
from swarmkit.net.protocol.messages import GetInfo, ServerInfo
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.server_info import ask
from swarmkit.net.transport.identity import Identity
from swarmkit.node.node import Node
from swarmkit.node.server import Server
from swarmkit.server.config import ServerConfig

from ..client.answers import answer, prompt
from ..models.tiny import make_checkpoint

NAMES = ("first", "second", "third")


def daemons() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
            if child.name().startswith("p2pd"):
                found.add(child.pid)
    return found


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("swarmkit")}


@pytest.fixture
def own_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this process makes its temporary files; a short name, for it holds sockets."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Three models, of other weights."""
    made = {}
    for blocks, name in enumerate(NAMES, start=3):
        folder = make_checkpoint(tmp_path_factory.mktemp(name), "llama", num_blocks=blocks)
        made[name] = Checkpoint.open(folder)
    return made


@dataclass
class Street:
    """A swarm that serves the third model, and a node that serves the other two."""

    models: dict[str, Checkpoint]
    swarm: LocalSwarm
    lease: portal.PortalLease
    node: Node

    async def announcements(self) -> list[Announcement]:
        """What another peer finds of all models."""
        factory = over_hivemind(self.swarm.initial_peers, client_mode=True)
        async with joined(factory, Identity()) as (_, registry):
            found = await registry.look_up_all()
        return [one for one in found.announcements.values() if one.peer_id == self.node.peer_id]

    async def info_of(self, server: Announcement, service: int) -> ServerInfo:
        """What another peer is told that asks one of the node's services."""
        factory = over_hivemind(self.swarm.initial_peers, client_mode=True)
        async with joined(factory, Identity()) as (transport, _):
            answer = await ask(transport, server.peer_id, server.addresses, GetInfo(), 10, service)
        assert isinstance(answer, ServerInfo)
        return answer


@pytest.fixture(scope="module")
def swarm(models: dict[str, Checkpoint]) -> Iterator[LocalSwarm]:
    with LocalSwarm(models["third"], num_stages=1) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def street(models: dict[str, Checkpoint], swarm: LocalSwarm) -> Iterator[Street]:
    node = Node(over_hivemind(swarm.initial_peers))
    node.add(ServerConfig(models["first"]))
    with portal.lease() as lease:
        running, _ = lease.start_task(node.run)
        lease.call(node.serve, ServerConfig(models["second"], blocks=(1, 3)))
        yield Street(models, swarm, lease, node)
        lease.call_soon(lambda: node.request_stop(0.0))
        running.result(60)


def test_two_models_are_announced_by_one_peer(street: Street) -> None:
    found = street.lease.call(street.announcements)
    assert {(one.num_blocks, one.start, one.stop, one.service) for one in found} == {
        (3, 0, 3, 0),
        (4, 1, 3, 1),
    }


def test_each_server_answers_for_itself_what_it_does(street: Street) -> None:
    (first, second) = sorted(street.lease.call(street.announcements), key=lambda one: one.service)
    told = [street.lease.call(street.info_of, one, one.service) for one in (first, second)]
    assert [(one.start, one.stop) for one in told] == [(0, 3), (1, 3)]


def test_a_service_that_the_peer_does_not_have_is_not_taken_for_an_old_peers(street: Street) -> None:
    server, *_ = street.lease.call(street.announcements)
    with pytest.raises(NotServedError):
        street.lease.call(street.info_of, server, 7)


def test_a_client_of_a_third_model_shares_the_nodes_connection(street: Street) -> None:
    before = daemons()
    with SwarmModelForCausalLM.from_pretrained(street.models["third"], node=street.node) as model:
        tokens = answer(model, prompt(5)[0], new_tokens=4)
        assert daemons() == before
    assert tokens.tolist() == answer(load_local(street.models["third"]), prompt(5)[0], new_tokens=4).tolist()


def test_a_model_that_the_node_serves_can_be_used_in_the_same_process(street: Street) -> None:
    with SwarmModelForCausalLM.from_pretrained(street.models["first"], node=street.node) as model:
        tokens = answer(model, prompt(5)[0], new_tokens=4)
    assert tokens.tolist() == answer(load_local(street.models["first"]), prompt(5)[0], new_tokens=4).tolist()


def test_a_client_that_ends_leaves_the_node_as_it_was(street: Street) -> None:
    with SwarmModelForCausalLM.from_pretrained(street.models["third"], node=street.node):
        pass
    assert len(street.lease.call(street.announcements)) == 2


def test_all_of_it_is_one_daemon_and_leaves_nothing(
    models: dict[str, Checkpoint], swarm: LocalSwarm, own_files: Path
) -> None:
    before = daemons(), threads()
    node = Node(over_hivemind(swarm.initial_peers))
    with portal.lease() as lease:
        running, _ = lease.start_task(node.run)
        lease.call(node.serve, ServerConfig(models["first"]))
        lease.call(node.serve, ServerConfig(models["second"]))
        model = SwarmModelForCausalLM.from_pretrained(models["third"], node=node)
        answer(model, prompt(5)[0], new_tokens=2)
        assert len(daemons() - before[0]) == 1
        assert list(own_files.iterdir()) != []
        lease.call_soon(lambda: node.request_stop(0.0))
        running.result(60)
        with pytest.raises(UsageError):
            lease.call(node.serve, ServerConfig(models["first"]))
    model.close()
    assert (daemons(), threads()) == before
    assert list(own_files.iterdir()) == []


def test_a_model_whose_node_has_stopped_says_so(models: dict[str, Checkpoint], swarm: LocalSwarm) -> None:
    node = Node(over_hivemind(swarm.initial_peers))
    with portal.lease() as lease:
        running, _ = lease.start_task(node.run)
        model = SwarmModelForCausalLM.from_pretrained(models["third"], node=node)
        lease.call_soon(node.request_stop)
        running.result(60)
        with pytest.raises(Exception, match="left the swarm"):
            answer(model, prompt(5)[0], new_tokens=2)
        model.close()


def test_a_server_may_be_run_by_the_node_of_another(models: dict[str, Checkpoint], swarm: LocalSwarm) -> None:
    before = daemons(), threads()
    with Server(models["first"], initial_peers=swarm.initial_peers) as one:
        with Server(models["second"], node=one.node) as other:
            assert len(daemons() - before[0]) == 1
            assert other.peer_id == one.peer_id
            with SwarmModelForCausalLM.from_pretrained(models["second"], node=one.node) as model:
                tokens = answer(model, prompt(5)[0], new_tokens=3)
        with SwarmModelForCausalLM.from_pretrained(models["first"], node=one.node) as model:
            answer(model, prompt(5)[0], new_tokens=1)
    assert tokens.tolist() == answer(load_local(models["second"]), prompt(5)[0], new_tokens=3).tolist()
    assert (daemons(), threads()) == before


def test_a_server_that_cannot_start_leaves_the_others(street: Street) -> None:
    with pytest.raises(Exception, match="no-such-dtype"):
        street.lease.call(street.node.serve, ServerConfig(street.models["second"], dtype="no-such-dtype"))
    assert len(street.node.servers) == 2
    assert len(street.lease.call(street.announcements)) == 2
