"""Sessions and swarms come and go, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from swarmkit.local.swarm import LocalSwarm
from swarmkit.net import portal
from swarmkit.settings import ClientSettings, ServerSettings

from ..waiting import wait_until
from .worlds import World, hidden_states

CYCLES = 60
# Nothing but the sessions shall happen while they are counted.
SERVER = ServerSettings().replace(announce_period_s=3000, record_lifetime_s=3600)
CLIENT = ClientSettings().replace(refresh_period_s=3000)


@dataclass(frozen=True)
class Resources:
    """What could leak, in one process."""

    threads: tuple[str, ...]
    descriptors: int
    children: int
    tasks: int = 0
    sessions: int = 0
    leased_bytes: int = 0
    receive_budget_bytes: int = 0


def process_counts() -> Resources:
    gc.collect()
    return Resources(
        threads=tuple(sorted(thread.name for thread in threading.enumerate())),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        children=len(psutil.Process().children(recursive=True)),
    )


def of_a_swarm(swarm: LocalSwarm) -> Resources:
    async def tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    services: list[Any] = [server.serving.sessions for server in swarm.servers]  # type: ignore[attr-defined]
    for service in services:
        service.budget.audit()
    with portal.lease() as lease:
        return replace(
            process_counts(),
            tasks=lease.call(tasks),
            sessions=sum(service.num_sessions for service in services),
            leased_bytes=sum(service.budget.leased_bytes for service in services),
            receive_budget_bytes=sum(service.receive_budget.held_bytes for service in services),
        )


def settled(census: Callable[[], Resources]) -> Resources:
    """The census once no session is open and it has stayed the same for a while."""
    seen: list[Resources] = []

    def is_settled() -> bool:
        seen.append(census())
        return len(seen) >= 15 and len(set(seen[-15:])) == 1 and not seen[-1].sessions

    wait_until(is_settled, "the resources stay the same", every=0.03)
    return seen[-1]


def after_a_moment(census: Callable[[], Resources], expected: Resources) -> Resources:
    """The census once it is what is expected, or as it is when that has not come about for long."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: census() == expected, "the resources are as before", within=10, every=0.025)
    return census()


def cycle(model: Any, number: int) -> None:
    """Open a session; every other one takes steps, and half of them are closed, the others forgotten."""
    session = model.session(max_length=32)
    if number % 2:
        session.step(hidden_states(2, 3))
        session.step(hidden_states(2, 1))
    if number % 4 < 2:
        session.close()


def live(world: World, transport: Any, end: Callable[[LocalSwarm], None] = lambda swarm: None) -> None:
    """Start a swarm, use it, and end it, after `end(swarm)`."""
    with LocalSwarm(world.checkpoint.name, 2, transport=transport, server_settings=SERVER) as swarm:
        cycle(swarm.model(), 1)
        end(swarm)


def kill_all(swarm: LocalSwarm) -> None:
    for server in swarm.servers:
        server.kill()


@pytest.fixture(scope="module", params=["memory", "hivemind"])
def used_transport(request: pytest.FixtureRequest, world: World) -> Any:
    """A transport of which this process has made and imported all that it does once."""
    live(world, request.param, kill_all)
    return request.param


@pytest.mark.parametrize("end", [lambda swarm: None, kill_all], ids=["closed", "killed"])
def test_a_swarm_that_has_ended_leaves_nothing(
    world: World, used_transport: Any, end: Callable[[LocalSwarm], None]
) -> None:
    before = settled(process_counts)
    live(world, used_transport, end)
    assert after_a_moment(process_counts, before) == before


@pytest.fixture(scope="module", params=["memory", "hivemind"])
def swarm(request: pytest.FixtureRequest, world: World) -> Iterator[LocalSwarm]:
    """A swarm that several tests use: none of them ends a server."""
    with LocalSwarm(
        world.checkpoint.name, 2, transport=request.param, server_settings=SERVER, client_settings=CLIENT
    ) as swarm:
        yield swarm


def test_sessions_leave_no_task_thread_stream_or_page(swarm: LocalSwarm) -> None:
    model = swarm.model()
    for number in range(4):  # what is made once, such as the connection to a peer, is made now
        cycle(model, number)
    before = settled(lambda: of_a_swarm(swarm))
    for number in range(CYCLES):
        cycle(model, number)
    assert after_a_moment(lambda: of_a_swarm(swarm), before) == before


def test_generations_leave_nothing(swarm: LocalSwarm) -> None:
    model = swarm.model()
    prompt = torch.tensor([[1, 5, 9]])
    model.generate(prompt, max_new_tokens=2, do_sample=False)
    before = settled(lambda: of_a_swarm(swarm))
    for _ in range(10):
        model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert after_a_moment(lambda: of_a_swarm(swarm), before) == before


def test_models_leave_nothing(swarm: LocalSwarm) -> None:
    swarm.model().close()
    before = settled(lambda: of_a_swarm(swarm))
    for number in range(4):
        model = swarm.model()
        cycle(model, 1)
        if number % 2:
            model.close()
        del model
    assert after_a_moment(lambda: of_a_swarm(swarm), before) == before
