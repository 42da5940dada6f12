"""A private swarm with an owner, over daemons: members generate, and strangers are refused everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.errors import NoRouteError, NotAdmittedError, SwarmkitError, TransportError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.connect import over_hivemind
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.protocol.weights_messages import WEIGHTS
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ClientSettings, ServerSettings

from .client.answers import answer, prompt
from .models.tiny import make_checkpoint
from .net.test_membership import INTRUDER, OWNER, SERVER, STRANGERS, USER, chain, servers_key
from .test_private_swarm import PROTOCOLS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SECOND_SERVER = Identity(bytes([6]) * 32)
BLOCKS = 4
SERVED = {SERVER: (0, 2), SECOND_SERVER: (2, BLOCKS)}
SERVER_SETTINGS = ServerSettings().replace(offer_head=True)  # so that it has an endpoint for each protocol
IMPATIENT = ClientSettings().replace(route_timeout_s=1.0)


@dataclass
class Owned:
    """Two servers that share a model; each peer has a certificate of its own."""

    checkpoint: Checkpoint
    meeting_point: list[str]
    server: Node
    """The first of the two."""
    lease: portal.PortalLease

    def model(self, identity: Identity, key: SwarmKey | None) -> SwarmModelForCausalLM:
        """The model as a peer with this key uses it."""
        join = over_hivemind(self.meeting_point, client_mode=True, swarm_key=key)
        join.identity = identity
        return SwarmModelForCausalLM.from_pretrained(self.checkpoint, transport=join, settings=IMPATIENT)

    def intrude(self, key: SwarmKey | None) -> HivemindTransport:
        """A peer that knows where the swarm is, and is not asked at its own end whether it may join."""

        async def create() -> HivemindTransport:
            return await HivemindTransport.create(identity=INTRUDER, swarm_key=key)

        return self.lease.call(create)


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owned]:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("owned"), "llama", BLOCKS))
    with ExitStack() as stack:
        lease = stack.enter_context(portal.lease())
        join = over_hivemind(swarm_key=servers_key(chain(OWNER, "serve", "use")))
        first = lease.call(join, OWNER, acceptable_now)
        stack.callback(lease.call, first.close)
        addresses = [str(address) for address in first.addresses]
        nodes = []
        for identity, blocks in SERVED.items():
            key = servers_key(chain(identity, "serve", "use"))
            nodes.append(node := Node(over_hivemind(addresses, swarm_key=key), identity))
            node.add(ServerConfig(checkpoint, blocks=blocks, settings=SERVER_SETTINGS))
            running, _ = lease.start_task(node.run)
            stack.callback(running.result)
            stack.callback(lease.call_soon, node.request_stop)
        yield Owned(checkpoint, addresses, nodes[0], lease)


def test_a_member_that_may_use_the_swarm_generates(owned: Owned) -> None:
    ids = prompt(5)[0]
    with owned.model(USER, servers_key(chain(USER, "use"))) as model:
        assert answer(model, ids, new_tokens=4).tolist() == (
            answer(load_local(owned.checkpoint), ids, new_tokens=4).tolist()
        )


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_generates_nothing(owned: Owned, kind: str) -> None:
    key, _ = STRANGERS[kind]
    with pytest.raises((NoRouteError, TransportError)), owned.model(INTRUDER, key) as model:
        model.generate(prompt(5)[0], max_new_tokens=1)


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_refused_at_each_endpoint_of_a_server(owned: Owned, kind: str) -> None:
    key, words = STRANGERS[kind]
    told: dict[str, str] = {}

    async def knock(protocol: Protocol) -> None:
        (await connect(stranger, protocol, SERVER.peer_id, owned.server.addresses)).close()

    stranger = owned.intrude(key)
    try:
        for protocol in PROTOCOLS:
            if protocol is WEIGHTS:  # files that are only on this machine are not handed out
                continue
            with pytest.raises(NotAdmittedError) as caught:
                owned.lease.call(knock, protocol)
            told[protocol.name] = str(caught.value)
    finally:
        owned.lease.call(stranger.close)
    assert [name for name, said in told.items() if words not in said] == []


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_does_not_learn_who_serves_what(owned: Owned, kind: str) -> None:
    async def look() -> str:
        try:
            join = over_hivemind(owned.meeting_point, client_mode=True, swarm_key=STRANGERS[kind][0])
            transport = await join(INTRUDER, acceptable_now)
        except SwarmkitError as error:
            return str(error)
        try:
            return str((await Registry(transport).look_up_all()).announcements)
        except SwarmkitError as error:
            return str(error)
        finally:
            await transport.close()

    found = owned.lease.call(look)
    assert [one for one in SERVED if one.peer_id in found] == []
