"""A peer that serves two runs of one model's blocks: clients use them like servers of two peers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.server.model_server import ModelServer

from ..client.answers import answer, prompt
from ..models.tiny import make_checkpoint

BLOCKS = 5
CUT = 2


@dataclass
class Twin:
    """A node with two runs of blocks, and a client elsewhere."""

    servers: list[ModelServer]
    model: SwarmModelForCausalLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("twin"), "llama", num_blocks=BLOCKS))


@pytest.fixture(scope="module")
def twin(checkpoint: Checkpoint) -> Iterator[Twin]:
    network = MemoryNetwork()
    node = Node(over_memory(network))
    servers = [node.add(ServerConfig(checkpoint, blocks=blocks)) for blocks in ((0, CUT), (CUT, BLOCKS))]
    with portal.lease() as lease:
        running, _ = lease.start_task(node.run)
        with SwarmModelForCausalLM.from_pretrained(checkpoint, transport=over_memory(network)) as model:
            yield Twin(servers, model)
        lease.call_soon(lambda: node.request_stop(0.0))
        running.result(60)


def gradient_of(model: SwarmModelForCausalLM) -> Tensor:
    """Of the sum of all blocks' outputs, by their inputs."""
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    model.blocks[0:BLOCKS](hidden).square().sum().backward()
    assert hidden.grad is not None
    return hidden.grad


def test_an_answer_goes_through_both(checkpoint: Checkpoint, twin: Twin) -> None:
    tokens = answer(twin.model, prompt(5)[0], new_tokens=6)
    assert tokens.tolist() == answer(load_local(checkpoint), prompt(5)[0], new_tokens=6).tolist()
    route = [(hop.start, hop.stop) for hop in twin.model.trace[-1].hops]
    assert route == [(0, CUT), (CUT, BLOCKS)]


def test_gradients_go_through_both(checkpoint: Checkpoint, twin: Twin) -> None:
    with LocalSwarm(checkpoint, num_stages=1, transport="memory") as swarm:
        wanted = gradient_of(swarm.model())
    assert torch.allclose(gradient_of(twin.model), wanted, atol=1e-5)


def test_each_counts_its_own_sessions(twin: Twin) -> None:
    with twin.model.session() as session:
        answer(twin.model, prompt(5)[0], session=session, new_tokens=2)
        assert [one.serving.sessions.num_sessions for one in twin.servers if one.serving] == [1, 1]
