"""The state of a swarm: its servers, model by model, and the blocks that no server has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from swarmkit.client.swarm.client import SwarmClient
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.net import portal
from swarmkit.net.connect import identity_for, over_hivemind
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.records import Announcement, ServerState
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.server_info import InfoAnswer, ask_all
from swarmkit.net.transport.seam import Transport
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.placement.ranges import uncovered

ANSWER_TIMEOUT_S = 3.0
"""How long a server may take to say what it is doing."""


@dataclass(frozen=True)
class ServerStatus:
    """What a server announces of itself, and its load if it answers.

    Attributes:
        name: what its owner calls it, for people; may be empty.
        blocks: [a, b).
        throughput: decode steps of one token per second, as announced.
        free_cache_tokens: tokens of one row that fit into the memory for keys and values, as the server
            answers, else as it announces. It is a claim: routes prefer servers that claim to have room, and
            a server without room refuses a step.
        dtype: the precision in which it computes.
        expires_in_s: how long the announcement is valid if it is not renewed.
        cache_tokens: tokens of one row for which there is memory in all; None if it does not answer.
        sessions, queue, expected_wait_s: open sessions, steps that wait, and how long a step of one token
            would wait; None if the server does not answer.
        uptime_s: for how long it has served these blocks; None if it does not answer.
        round_trip_s: from a question to its answer, measured now; None if it does not answer.
    """

    peer_id: str
    name: str
    blocks: tuple[int, int]
    state: ServerState
    throughput: float
    free_cache_tokens: int
    dtype: str
    software: str
    addresses: tuple[str, ...]
    expires_in_s: float
    sessions: int | None
    queue: int | None
    expected_wait_s: float | None
    cache_tokens: int | None = None
    uptime_s: float | None = None
    round_trip_s: float | None = None


@dataclass(frozen=True)
class ModelStatus:
    """The servers of one model, by their blocks; `missing` are the ranges that no server offers."""

    model: str
    fingerprint: str
    num_blocks: int
    missing: tuple[tuple[int, int], ...]
    servers: tuple[ServerStatus, ...]

    @property
    def replicas(self) -> tuple[int, ...]:
        """How many servers that are online each block has."""
        online = [server.blocks for server in self.servers if server.state == "online"]
        return tuple(sum(low <= block < high for low, high in online) for block in range(self.num_blocks))

    def missing_without(self, left: ServerStatus) -> tuple[tuple[int, int], ...]:
        """The ranges of blocks that no server would offer if one of these left."""
        others = [s.blocks for s in self.servers if s is not left and s.state == "online"]
        return tuple(uncovered(0, self.num_blocks, others))

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return asdict(self)


def swarm_status(
    initial_peers: Sequence[str],
    timeout_s: float = ANSWER_TIMEOUT_S,
    swarm_key: SwarmKey | str | os.PathLike[str] | None = None,
    identity_path: str | os.PathLike[str] | None = None,
) -> list[ModelStatus]:
    """Join a swarm, look at all models in it, and leave. Must not be called on an event loop's thread.

    Args:
        initial_peers: addresses of peers of the swarm.
        timeout_s: how long a server may take to answer.
        swarm_key: the key of a private swarm, or its file.
        identity_path: a file with the identity to come as; a new one if not given.

    Raises:
        TransportError: no peer can be reached.
    """
    with closing(watch_swarm(initial_peers, 0.0, timeout_s, swarm_key, identity_path)) as looks:
        return next(looks)


def watch_swarm(
    initial_peers: Sequence[str],
    every_s: float = 2.0,
    timeout_s: float = ANSWER_TIMEOUT_S,
    swarm_key: SwarmKey | str | os.PathLike[str] | None = None,
    identity_path: str | os.PathLike[str] | None = None,
) -> Generator[list[ModelStatus], None, None]:
    """Join a swarm and look at all models in it again and again; leave when the generator is closed.

    Args:
        initial_peers: addresses of peers of the swarm.
        every_s: seconds between two looks.
        timeout_s: how long a server may take to answer.
        swarm_key: the key of a private swarm, or its file.
        identity_path: a file with the identity to come as; a new one if not given.

    Raises:
        TransportError: no peer can be reached.
    """
    with portal.lease() as lease:
        factory = over_hivemind(initial_peers, client_mode=True, swarm_key=swarm_key)
        transport = lease.call(factory, identity_for(factory, identity_path), acceptable_now)
        try:
            while True:
                yield lease.call(look_up_status, transport, SYSTEM_CLOCK, timeout_s)
                lease.call(asyncio.sleep, every_s)
        finally:
            lease.call(transport.close)


async def look_up_status(
    transport: Transport, clock: Clock = SYSTEM_CLOCK, timeout_s: float = ANSWER_TIMEOUT_S
) -> list[ModelStatus]:
    """Read the announcements of all models in the swarm, and ask each server for its load.

    Raises:
        TransportError: the shared table cannot be read.
    """
    found = await Registry(transport, lambda: clock.time()).look_up_all()
    now = clock.time()
    servers = found.servers(now, ("joining", "online", "leaving"))
    answering = [server for server in servers if server.state != "joining"]
    return model_statuses(servers, await ask_all(transport, answering, timeout_s, clock), now)


async def servers_of(swarm: SwarmClient, timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[ServerStatus, ...]:
    """Look up the servers of a client's model, and ask each for its load.

    Raises:
        TransportError: the shared table cannot be read.
    """
    servers = await swarm.known.look()
    answering = [server for server in servers if server.state != "joining"]
    infos = await ask_all(swarm.transport, answering, timeout_s, swarm.clock)
    found = model_statuses(servers, infos, swarm.clock.time())
    return tuple(server for model in found for server in model.servers)


def model_statuses(
    servers: Sequence[Announcement], infos: dict[str, InfoAnswer], now: float
) -> list[ModelStatus]:
    """Sort announcements by model.

    Args:
        infos: what servers answered, by service id.
        now: Unix time, in seconds.
    """
    by_model: dict[tuple[str, str, int], list[Announcement]] = {}
    for server in servers:
        by_model.setdefault((server.model, server.fingerprint, server.num_blocks), []).append(server)
    return [
        ModelStatus(
            model,
            fingerprint,
            num_blocks,
            tuple(uncovered(0, num_blocks, [(s.start, s.stop) for s in of_model if s.state == "online"])),
            tuple(
                _server_status(server, infos.get(server.service_id), now)
                for server in sorted(of_model, key=lambda s: (s.start, s.stop, s.peer_id))
            ),
        )
        for (model, fingerprint, num_blocks), of_model in sorted(by_model.items())
    ]


def _server_status(server: Announcement, answer: InfoAnswer | None, now: float) -> ServerStatus:
    info = None if answer is None else answer.info
    return ServerStatus(
        peer_id=server.peer_id,
        name=server.public_name,
        blocks=(server.start, server.stop),
        state=server.state,
        throughput=round(server.throughput, 1),
        free_cache_tokens=server.free_cache_tokens if info is None else info.cache_tokens_free,
        dtype=server.dtype,
        software=server.software,
        addresses=tuple(server.addresses),
        expires_in_s=round(server.expires_at - now, 1),
        sessions=None if info is None else info.sessions,
        queue=None if info is None else info.waiting,
        expected_wait_s=None if info is None else round(info.expected_wait_ms / 1e3, 3),
        cache_tokens=None if info is None else info.cache_tokens_total,
        uptime_s=None if info is None else round(info.uptime_s, 1),
        round_trip_s=None if answer is None else round(answer.round_trip_s, 6),
    )
