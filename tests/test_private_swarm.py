"""A private swarm as its users have it: all works with the key, and nothing does without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import torch

from swarmkit import LocalSwarm, NoRouteError
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.client.status import swarm_status
from swarmkit.errors import NotAdmittedError, TransportError, UsageError
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net import portal
from swarmkit.net.connect import joined
from swarmkit.net.protocol.messages import SESSION, Fault
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.protocol.weights_messages import WEIGHTS
from swarmkit.net.rpc.endpoints import connect, listen
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.seam import Stream
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.settings import ClientSettings, ServerSettings

from .cli.commands import run_here, start
from .models.tiny import make_checkpoint
from .net.protocols import PROTOCOLS

pytestmark = pytest.mark.usefixtures("kept_fork_server")

KEY = SwarmKey()
PROMPT = torch.tensor([[5, 9, 33]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("private"), "llama"))


@pytest.fixture(scope="module")
def swarm(tiny: Checkpoint) -> Iterator[LocalSwarm]:
    offered = ServerSettings().replace(offer_head=True)
    with LocalSwarm(tiny, num_stages=2, transport="memory", swarm_key=KEY, server_settings=offered) as swarm:
        yield swarm


def test_a_client_with_the_key_generates_over_servers_that_push_to_each_other(swarm: LocalSwarm) -> None:
    with swarm.model() as model:
        assert model.generate(PROMPT, max_new_tokens=3).shape == (1, 6)


@pytest.mark.parametrize("key", [None, SwarmKey()], ids=["without", "other"])
def test_a_client_without_the_key_sees_no_server(
    swarm: LocalSwarm, tiny: Checkpoint, key: SwarmKey | None
) -> None:
    assert swarm.network is not None
    settings = ClientSettings().replace(route_timeout_s=0.1)
    reach = over_memory(swarm.network, key)
    with (
        SwarmModelForCausalLM.from_pretrained(tiny, transport=reach, settings=settings) as model,
        pytest.raises(NoRouteError),
    ):
        model.generate(PROMPT, max_new_tokens=1)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda one: one.name)
def test_a_stranger_is_refused_at_each_endpoint_of_a_server(swarm: LocalSwarm, protocol: Protocol) -> None:
    server = swarm.servers[0].peer_id

    async def knock() -> None:
        assert swarm.network is not None
        stranger = swarm.network.transport()
        try:
            await connect(stranger, protocol, server)
        finally:
            await stranger.close()

    if protocol is WEIGHTS:
        pytest.skip("files that are only on this machine are not handed out")
    with portal.lease() as lease, pytest.raises(NotAdmittedError, match="is private"):
        lease.call(knock)


def test_server_processes_read_the_key_from_a_file(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="file"):
        LocalSwarm(tiny, processes=True, swarm_key=KEY)


def test_commands_share_a_private_swarm(tmp_path: Path) -> None:
    key = str(tmp_path / "key")
    assert run_here("swarm-key", "create", key).returncode == 0
    secret = Path(key).read_text().split()[-1]
    server = start("serve", "tiny-chat", "--swarm-key", key, until="serving_started")
    try:
        join = ("--join", server.address)
        answer = run_here("generate", "tiny-chat", "What is 2 + 3?", *join, "--swarm-key", key, "--json")
        assert "5" in answer.last_json()["answer"]
        assert [model.model for model in swarm_status([server.address], swarm_key=key)] == ["tiny-chat"]
        refused = run_here("generate", "tiny-chat", "Hello", *join)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "its swarm is private" in refused.stderr
        with pytest.raises(TransportError, match="is private"):
            swarm_status([server.address])
    finally:
        ended = server.end_with(15)
    assert secret not in ended.stdout + ended.stderr


# lists of peers


@pytest.fixture(scope="module")
def open_swarm(tiny: Checkpoint) -> Iterator[LocalSwarm]:
    """Two stages, served once each."""
    with LocalSwarm(tiny, num_stages=2, transport="memory") as swarm:
        yield swarm


@pytest.fixture
def client_identity(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "identity"
    return path, Identity.load_or_create(path).peer_id


@pytest.mark.parametrize("list_name", ["allowed_peers", "blocked_peers"])
def test_a_server_that_excludes_a_client_is_left_for_one_that_does_not(
    open_swarm: LocalSwarm, client_identity: tuple[Path, str], list_name: str
) -> None:
    path, client = client_identity
    named = "nobody of this swarm" if list_name == "allowed_peers" else client
    picky = ServerSettings().replace(**{list_name: (named,), "throughput": 1e6})
    server = open_swarm.add_server(open_swarm.servers[0].blocks, settings=picky)
    try:
        with open_swarm.model(identity_path=path) as model, model.session(max_length=8) as session:
            model.generate(PROMPT, max_new_tokens=2)
            assert session.route[0].startswith("server-0")
    finally:
        server.stop(0.0)


@pytest.fixture(scope="module")
def closed_swarm(tiny: Checkpoint) -> Iterator[LocalSwarm]:
    """Servers with all that servers can offer, that admit nobody who is there."""
    settings = ServerSettings().replace(allowed_peers=("a friend",), offer_head=True)
    with LocalSwarm(tiny, 2, 2, transport="memory", server_settings=settings) as swarm:
        yield swarm


async def code_at(network: MemoryNetwork, peer_id: str, endpoint: str) -> str:
    """What a stranger is told that opens a stream at an endpoint, and says nothing."""
    stranger = network.transport()
    try:
        stream = await stranger.open(peer_id, endpoint)
        with anyio.fail_after(20):
            said = (await MessageStream(stream, SESSION, 0).next()).message
        return said.code if isinstance(said, Fault) else ""
    finally:
        await stranger.close()


def test_a_peer_that_is_not_admitted_is_told_so_at_every_endpoint_of_a_server(
    closed_swarm: LocalSwarm,
) -> None:
    assert closed_swarm.network is not None
    server = closed_swarm.servers[0].peer_id
    endpoints = sorted(closed_swarm.network.endpoints(server))
    assert set(endpoints) >= {one.endpoint for one in PROTOCOLS} - {WEIGHTS.endpoint}  # not of local files
    with portal.lease() as lease:
        codes = {at: lease.call(code_at, closed_swarm.network, server, at) for at in endpoints}
    assert codes == dict.fromkeys(endpoints, "not_admitted")


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda one: one.name)
async def test_whatever_a_peer_serves_is_not_for_those_that_its_lists_exclude(protocol: Protocol) -> None:
    network, served = MemoryNetwork(), []

    async def serve(stream: Stream) -> None:
        served.append(stream.peer_id)

    async with joined(over_memory(network), Identity()) as (transport, _):
        await listen(transport, protocol, serve)
        with transport.deal_with(PeerLists(allowed=["a friend"])):
            assert await code_at(network, transport.peer_id, protocol.endpoint) == "not_admitted"
    assert served == []


PATIENT = ClientSettings().replace(route_timeout_s=3600.0)
"""A client that would wait for longer than a test may take."""


@pytest.mark.timeout(60)
def test_a_client_that_all_servers_exclude_is_told_so_at_once(
    closed_swarm: LocalSwarm, client_identity: tuple[Path, str]
) -> None:
    path, client = client_identity
    with (
        closed_swarm.model(identity_path=path, settings=PATIENT) as model,
        pytest.raises(NoRouteError, match=r"refuses this client.*does not admit.*--allow") as caught,
    ):
        model.generate(PROMPT, max_new_tokens=1)
    assert client in str(caught.value)


@pytest.mark.timeout(60)
def test_a_client_that_trains_and_is_excluded_is_told_so_at_once(closed_swarm: LocalSwarm) -> None:
    with (
        closed_swarm.model(settings=PATIENT) as model,
        pytest.raises(NoRouteError, match="refuses this client"),
    ):
        model(PROMPT, labels=PROMPT, use_cache=False).loss.backward()


def test_a_client_whose_lists_exclude_all_servers_is_told_so(open_swarm: LocalSwarm) -> None:
    impatient = ClientSettings().replace(route_timeout_s=0.1, allowed_servers=("a friend",))
    with (
        open_swarm.model(settings=impatient) as model,
        pytest.raises(NoRouteError, match="the lists of this client exclude every server of blocks 0:5"),
    ):
        model.generate(PROMPT, max_new_tokens=1)


def test_servers_that_exclude_each_other_exchange_outputs_through_the_client(
    tiny: Checkpoint, client_identity: tuple[Path, str]
) -> None:
    path, client = client_identity
    settings = ServerSettings().replace(allowed_peers=(client,))
    with (
        LocalSwarm(tiny, num_stages=2, transport="memory", server_settings=settings) as swarm,
        swarm.model(identity_path=path) as model,
    ):
        assert model.generate(PROMPT, max_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("name", ["allowed_servers", "blocked_servers"])
def test_from_pretrained_takes_lists_of_servers(tiny: Checkpoint, name: str, wanted: int) -> None:
    with LocalSwarm(tiny, num_stages=1, replicas=2, transport="memory") as swarm:
        listed = swarm.servers[wanted if name == "allowed_servers" else 1 - wanted].peer_id
        with swarm.model(**{name: [listed]}) as model, model.session(max_length=8) as session:
            model.generate(PROMPT, max_new_tokens=2)
            assert session.route[0].startswith(f"server-{wanted}")


def test_commands_take_lists_of_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_CLIENT_ROUTE_TIMEOUT_S", "1")
    friend, stranger = str(tmp_path / "friend"), str(tmp_path / "stranger")
    admitted = run_here("identity", friend).stdout.strip()
    server = start("serve", "tiny-chat", "--allow", admitted, until="serving_started")
    try:
        ask = ("generate", "tiny-chat", "What is 2 + 3?", "--join", server.address, "--identity")
        assert "5" in run_here(*ask, friend, "--json").last_json()["answer"]
        refused = run_here(*ask, stranger)
        blocked = run_here(*ask, friend, "--block", server.event["owner"]["peer_id"])
    finally:
        server.end_with(15)
    assert (refused.returncode, blocked.returncode) == (1, 1)
    assert "does not admit" in refused.stderr
