"""Small swarms over the memory transport, whose servers can be made to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.events import PeerLost
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net import portal
from swarmkit.node.server import Server
from swarmkit.settings import ClientSettings

from .answers import answer, at, prompt

NEW_TOKENS = 6
STAGES = [(0, 1), (1, 3), (3, 5)]

WAYS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "greedy": ((7,), {}),
    "sampling": ((7,), {"do_sample": True, "temperature": 1.3}),
    "beams": ((7,), {"num_beams": 3}),
    "left-padded batch": ((7, 3, 5), {}),
    "prompt lookup": ((7,), {"prompt_lookup_num_tokens": 3}),
}


class World:
    """A swarm in this process, a client of it, and hands to break it."""

    def __init__(self, swarm: LocalSwarm, settings: ClientSettings) -> None:
        assert swarm.network is not None
        self.swarm = swarm
        self.network = swarm.network
        self.model: SwarmModelForCausalLM = swarm.model(settings=settings)
        self.client = self.model.connection.client

    def answer(
        self, way: str = "greedy", actions: dict[int, Callable[[], object]] | None = None, **options: Any
    ) -> Tensor:
        lengths, how = WAYS[way]
        options = {"new_tokens": NEW_TOKENS, **how, **options}
        tokens: Tensor = answer(self.model, *prompt(*lengths), logits_processor=at(actions or {}), **options)
        return tokens

    def in_use(self, stage: int) -> Server:
        """The server that is stage number `stage` of the latest route."""
        route = list(dict.fromkeys(hop.peer_id for hop in self.client.trace[-1].hops))
        return self.server(route[stage])

    def server(self, peer_id: str) -> Server:
        server = next(server for server in self.swarm.servers if server.peer_id == peer_id)
        assert isinstance(server, Server)
        return server

    def add(self, *blocks: tuple[int, int], **options: Any) -> list[Server]:
        """Start servers and have the client know them."""
        servers = [self.swarm.add_server(each, **options) for each in blocks]
        self.look()
        return servers  # type: ignore[return-value]

    def look(self) -> None:
        self.model.connection.call(self.client.known.refresh)

    def on_loop(self, function: Callable[[], object]) -> None:
        async def call() -> None:
            function()

        with portal.lease() as lease:
            lease.call(call)

    def hang(self, server: Server) -> None:
        self.on_loop(lambda: self.network.hang(server.peer_id))

    def lost(self) -> list[str]:
        return [event.peer_id for event in self.model.events if isinstance(event, PeerLost)]

    def events(self, kind: type) -> list[Any]:
        return [event for event in self.model.events if isinstance(event, kind)]


@contextmanager
def a_world(checkpoint: Checkpoint, replicas: int = 2, stages: int = 3, **options: Any) -> Iterator[World]:
    servers = options.pop("server_settings", None)
    settings = ClientSettings().replace(
        **{
            "ban_s": 60,  # longer than the records of the dead are believed
            "max_ban_s": 60,
            "min_step_timeout_s": 60,
            "untried_wait_s": 60,  # a machine that stands still for a second has no server be left aside
            "refresh_period_s": 3600,
            **options,
        }
    )
    with LocalSwarm(checkpoint, stages, replicas, transport="memory", server_settings=servers) as swarm:
        yield World(swarm, settings)


def assert_same(tokens: Tensor, wanted: Tensor) -> None:
    assert tokens.tolist() == wanted.tolist()


# one server
