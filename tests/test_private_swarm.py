"""A private swarm as its users have it: all works with the key, and nothing does without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swarmkit import LocalSwarm, NoRouteError
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.client.status import swarm_status
from swarmkit.errors import NotAdmittedError, TransportError, UsageError
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net import portal
from swarmkit.net.protocol.adapter_messages import ADAPTER
from swarmkit.net.protocol.gradient_messages import GRADIENT
from swarmkit.net.protocol.messages import PUSH, SESSION
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.settings import ClientSettings

from .cli.commands import run_here, start
from .models.tiny import make_checkpoint

KEY = SwarmKey()
PROMPT = torch.tensor([[5, 9, 33]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("private"), "llama"))


@pytest.fixture(scope="module")
def swarm(tiny: Checkpoint) -> Iterator[LocalSwarm]:
    with LocalSwarm(tiny, num_stages=2, transport="memory", swarm_key=KEY) as swarm:
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


@pytest.mark.parametrize("protocol", [SESSION, PUSH, GRADIENT, ADAPTER], ids=lambda one: one.name)
def test_a_stranger_is_refused_at_each_endpoint_of_a_server(swarm: LocalSwarm, protocol: object) -> None:
    server = swarm.servers[0].peer_id

    async def knock() -> None:
        assert swarm.network is not None
        stranger = swarm.network.transport()
        try:
            await connect(stranger, protocol, server)  # type: ignore[arg-type]
        finally:
            await stranger.close()

    with portal.lease() as lease, pytest.raises(NotAdmittedError, match="is private"):
        lease.call(knock)


def test_server_processes_read_the_key_from_a_file(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="file"):
        LocalSwarm(tiny, processes=True, swarm_key=KEY)


def test_commands_share_a_private_swarm(tmp_path: Path) -> None:
    key = str(tmp_path / "key")
    assert run_here("swarm-key", key).returncode == 0
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
