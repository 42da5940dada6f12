"""Servers are killed while they serve a session, whenever a seed says, and the tokens stay the same.

In process, over the memory transport: a kill ends all streams and tasks of a server, wherever its step is.
`test_kill_processes` does the same to real processes, a few times.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from swarmkit.events import RoutePlanned, following
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.node.server import Server
from swarmkit.settings import ServerSettings

from ..waiting import wait_until
from .answers import answer, at, prompt
from .recovery import STAGES, World, a_world

NEW_TOKENS = 20
CHUNK_TOKENS = 16
PROMPT_TOKENS = 80
"""A prefill takes five steps on each stage."""
QUICK, ALL = 12, 200
APART = 4
"""So many tokens after a kill the session is known to have met it, and to have other servers."""
WAYS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "greedy": ((PROMPT_TOKENS,), {}),
    "sampling": ((PROMPT_TOKENS,), {"do_sample": True, "temperature": 1.3}),
    "beams": ((PROMPT_TOKENS // 3,), {"num_beams": 3}),
    "left-padded batch": ((PROMPT_TOKENS // 2, 3, 5), {}),
}


@dataclass(frozen=True)
class Kill:
    """One server's end.

    Attributes:
        stage: which one of the route.
        token: after so many new tokens; 0 = in the prefill.
        delay_s: how long after that.
    """

    stage: int
    token: int
    delay_s: float


@dataclass(frozen=True)
class Schedule:
    way: str
    kills: tuple[Kill, ...]


def schedule_of(seed: int) -> Schedule:
    """Return one to three kills, a third of the first ones in the prefill."""
    chance = random.Random(seed)
    first = 0 if seed % 3 == 0 else chance.randint(1, 3)
    tokens = [first]
    while len(tokens) < 3 and chance.random() < 0.5:
        tokens.append(tokens[-1] + APART + chance.randint(0, 2))
    kills = tuple(Kill(chance.randrange(3), token, chance.uniform(0.0, 0.015)) for token in tokens)
    return Schedule(chance.choice(list(WAYS)), kills)


@dataclass
class Killer:
    """Carries out a schedule, and notes what its victims did when they were killed."""

    world: World
    sessions: dict[str, int] = field(default_factory=dict)
    """How many sessions each victim served when it was killed."""
    _under_way: list[threading.Thread] = field(default_factory=list)

    def kill_in_prefill(self, kill: Kill, planned: Any) -> None:
        """Kill a server of a route that has just been planned, once it has the session."""
        number = int(planned.route[kill.stage].split()[0].removeprefix("server-"))
        victim: Any = self.world.swarm.servers[number]
        wait_until(lambda: serves(victim), "the server has the session", every=0.0002)
        self._kill_soon(victim, kill.delay_s)

    def kill_later(self, kill: Kill) -> None:
        """Kill a server of the latest step."""
        self._kill_soon(self.world.in_use(kill.stage), kill.delay_s)

    def wait(self, kills: int) -> None:
        """Wait until so many have been killed."""
        wait_until(lambda: len(self.sessions) >= kills, "the server is killed")
        while self._under_way:
            self._under_way.pop().join()

    def _kill_soon(self, victim: Server, delay_s: float) -> None:
        def strike() -> None:
            self.sessions[victim.peer_id] = serves(victim)
            victim.kill()

        timer = threading.Timer(delay_s, strike)
        timer.start()
        self._under_way.append(timer)


def serves(server: Server) -> int:
    """How many sessions a server has now."""
    assert server.serving is not None
    return server.serving.sessions.num_sessions


@pytest.fixture(scope="module")
def world(tiny_llama: Checkpoint, request: pytest.FixtureRequest) -> Iterator[World]:
    """A swarm for many schedules; each brings a server for each that it kills."""
    settings = ServerSettings().replace(max_step_tokens=CHUNK_TOKENS * 3)
    with a_world(tiny_llama, push=request.param, server_settings=settings) as world:
        yield world


@pytest.fixture(scope="module")
def local(tiny_llama: Checkpoint) -> Any:
    """The whole model on this machine."""
    return load_local(tiny_llama)


def schedules() -> list[Any]:
    """Half of the schedules are of servers that hand outputs on; the others give them to the client."""
    ways = {True: "server-to-server", False: "via-client"}
    slowly = {False: (), True: (pytest.mark.slow,)}
    return [
        pytest.param(push, seed, id=f"{ways[push]}-{seed}", marks=slowly[seed >= QUICK])
        for push in ways
        for seed in range(0 if push else 1, ALL, 2)
    ]


@pytest.mark.parametrize(("world", "seed"), schedules(), indirect=["world"])
def test_tokens_are_the_same_whoever_is_killed(world: World, local: Any, seed: int) -> None:
    schedule, killer = schedule_of(seed), Killer(world)
    lengths, options = WAYS[schedule.way]
    ids, mask = prompt(*lengths, seed=1000 + seed)  # which nobody has computed before
    world.add(*(STAGES[kill.stage] for kill in schedule.kills))
    actions: dict[int, Any] = {}
    with ExitStack() as owned:
        for number, kill in enumerate(schedule.kills, start=1):
            if kill.token:
                actions[kill.token] = partial(killer.kill_later, kill)
            else:
                act = partial(killer.kill_in_prefill, kill)
                owned.enter_context(following(world.client.events, act, RoutePlanned))
            actions[kill.token + APART - 2] = partial(
                killer.wait, number
            )  # so that the session is sure to meet a dead server
        tokens = answer(
            world.model, ids, mask, new_tokens=NEW_TOKENS, logits_processor=at(actions), **options
        )

    assert tokens.tolist() == answer(local, ids, mask, new_tokens=NEW_TOKENS, **options).tolist()
    assert len(killer.sessions) == len(schedule.kills)
    assert all(killer.sessions.values()), "a victim did not serve the session when it was killed"
    assert set(killer.sessions) <= set(world.lost())
