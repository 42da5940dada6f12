"""A session that cannot begin for want of room gives back what it holds, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
import torch
from anyio.abc import TaskGroup

from swarmkit.client.session.chain import ChainSession
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.errors import NoRouteError
from swarmkit.events import Rerouted, WaitStarted
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.plan import cache_cost
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.server.model_server import ModelServer
from swarmkit.settings import ClientSettings, ServerSettings

from .. import virtual_time

BLOCKS, HALF = 5, 2
PROMPT = 8
QUICK_S, SLOW_S = 0.001, 1.0
"""For each token of a forward pass. A full server with two sessions says that it has room in 0.5 s."""


@dataclass
class TightSwarm:
    """A server of the first half of the model, one of the second half with room for one session, a client."""

    checkpoint: Checkpoint
    clock: virtual_time.VirtualClock
    tasks: TaskGroup
    network: MemoryNetwork
    first: ModelServer
    second: ModelServer
    client: SwarmClient

    async def fill(self) -> ChainSession:
        """Another session takes all the room of the second half."""
        session = ChainSession(self.client, PAGE_TOKENS, HALF, BLOCKS)
        await session.step(torch.zeros(1, 1, self.checkpoint.hidden_size))
        return session

    @property
    def held_bytes(self) -> int:
        """What the caches of sessions take at the first half."""
        assert self.first.serving is not None
        return self.first.serving.sessions.budget.leased_bytes


async def served(
    checkpoint: Checkpoint,
    clock: virtual_time.VirtualClock,
    network: MemoryNetwork,
    tasks: TaskGroup,
    name: str,
    blocks: tuple[int, int],
    **settings: Any,
) -> ModelServer:
    node = Node(over_memory(network), clock=clock)
    own = ServerSettings().replace(prefix_cache="off", **settings)
    server = node.add(ServerConfig(checkpoint, blocks=blocks, public_name=name, settings=own))
    await tasks.start(node.run)
    return server


def lived(
    checkpoint: Checkpoint,
    story: Callable[[TightSwarm], Awaitable[None]],
    token_s: float,
    **settings: Any,
) -> None:
    """Let a story happen; args: settings: of the client."""
    a_page = PAGE_TOKENS * (BLOCKS - HALF) * cache_cost(checkpoint, torch.float32).token_bytes

    async def main(clock: virtual_time.VirtualClock) -> None:
        network = MemoryNetwork(clock=clock.time)
        model = ModelRef("tiny", checkpoint.fingerprint, BLOCKS, checkpoint.hidden_size)
        client = SwarmClient(model, ClientSettings().replace(**settings), clock=clock)
        async with anyio.create_task_group() as tasks:
            first = await served(checkpoint, clock, network, tasks, "first", (0, HALF))
            second = await served(
                checkpoint, clock, network, tasks, "second", (HALF, BLOCKS), cache_bytes=a_page
            )
            node = Node(over_memory(network), clock=clock)
            await tasks.start(node.run)
            await tasks.start(node.run_client, client)
            await story(TightSwarm(checkpoint, clock, tasks, network, first, second, client))
            tasks.cancel_scope.cancel()

    virtual_time.run(main, virtual_time.SharedStages(checkpoint, lambda tokens: tokens * token_s))


def prompt_of(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.randn(1, PROMPT, checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("token_s", "holds"), [(QUICK_S, False), (SLOW_S, True)])
@pytest.mark.parametrize("push", [True, False])
def test_a_session_holds_no_cache_while_it_waits_unless_to_compute_it_again_takes_longer(
    tiny_llama: Checkpoint, push: bool, token_s: float, holds: bool
) -> None:
    async def story(swarm: TightSwarm) -> None:
        other = await swarm.fill()
        mine = ChainSession(swarm.client, PAGE_TOKENS)
        waiting = swarm.client.events.subscribe(10, WaitStarted)

        async def begin() -> None:
            found.append(await mine.step(prompt))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(begin)
            await anext(aiter(waiting))
            await anyio.sleep(0.2)
            assert (swarm.held_bytes > 0) == holds
            other.close()
        mine.close()

    found: list[torch.Tensor] = []
    prompt = prompt_of(tiny_llama)
    lived(tiny_llama, story, token_s, push=push)
    whole = Stage.load(tiny_llama, 0, BLOCKS)
    wanted = whole.forward(prompt, whole.new_cache(0, BLOCKS))
    assert torch.allclose(wanted, found[0], rtol=0, atol=1e-4)


def test_a_session_that_begins_anew_again_and_again_gives_up_in_time(tiny_llama: Checkpoint) -> None:
    async def story(swarm: TightSwarm) -> None:
        await swarm.fill()
        began = swarm.clock.now()
        with pytest.raises(NoRouteError, match="had no room for 5 s"):
            await ChainSession(swarm.client, PAGE_TOKENS).step(prompt_of(tiny_llama))
        assert swarm.clock.now() - began < 10
        assert swarm.held_bytes == 0

    lived(tiny_llama, story, QUICK_S, route_timeout_s=5.0)


def test_a_session_that_begins_anew_takes_another_server_that_has_come(tiny_llama: Checkpoint) -> None:
    async def story(swarm: TightSwarm) -> None:
        await swarm.fill()
        mine = ChainSession(swarm.client, PAGE_TOKENS)

        async def begin() -> None:
            await mine.step(prompt_of(tiny_llama))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(begin)
            await anyio.sleep(0.5)
            await served(swarm.checkpoint, swarm.clock, swarm.network, swarm.tasks, "new", (0, BLOCKS))
        assert mine.route[-1].server.public_name == "new"
        assert [event.label for event in swarm.client.events.history if isinstance(event, Rerouted)]

    lived(tiny_llama, story, QUICK_S)


def test_a_session_takes_the_place_of_another_one_of_its_client_at_once(tiny_llama: Checkpoint) -> None:
    """Though the server has said that it has no room for a long time."""

    async def story(swarm: TightSwarm) -> None:
        other = await swarm.fill()
        mine = ChainSession(swarm.client, PAGE_TOKENS)
        hop = other.route[0]
        swarm.client.busy.note(hop.server.service_id, 30.0)

        async def begin() -> None:
            await mine.step(prompt_of(tiny_llama))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(begin)
            await anyio.sleep(5.0)
            began = swarm.clock.now()
            other.close()
        assert swarm.clock.now() - began < 1.0

    lived(tiny_llama, story, QUICK_S)
