"""A session that begins like an earlier one goes where that one went, if this saves time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.client.routing.affinity import time_saved_s
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.settings import ClientSettings

from .answers import answer, prompt

LONG = prompt(200)[0]


@pytest.fixture
def swarm(tiny_llama: Checkpoint) -> Iterator[LocalSwarm]:
    settings = ClientSettings().replace(spares=False)
    with LocalSwarm(tiny_llama, 1, 2, transport="memory", client_settings=settings) as swarm:
        yield swarm


def route_of(model: SwarmModelForCausalLM) -> str:
    (hop,) = model.trace[-1].hops
    return hop.peer_id


def go_elsewhere(model: SwarmModelForCausalLM, peer_id: str, seed: int) -> str:
    """Have another session run over the other server."""
    bans = model.connection.client.bans
    bans.convict(peer_id, 3600.0)
    answer(model, prompt(200, seed=seed)[0], new_tokens=2)
    bans.convicted.clear()
    bans.failures.clear()
    assert route_of(model) != peer_id
    return route_of(model)


def make_slower(model: SwarmModelForCausalLM, peer_id: str, seconds: float) -> None:
    """What the client has seen of a server is so much slower than of all others."""
    for name, times in model.connection.client.routes.times.items():
        for _ in range(64):
            times.observe(1, seconds if name == peer_id else 0.001)


def test_a_prompt_that_was_sent_before_goes_where_it_went(swarm: LocalSwarm) -> None:
    model = swarm.model()
    answer(model, LONG, new_tokens=2)
    first = route_of(model)
    assert go_elsewhere(model, first, seed=1) != first
    make_slower(model, first, 0.00101)  # by so little that the saved prompt is worth more
    answer(model, LONG, new_tokens=2)
    assert route_of(model) == first
    assert any(step.restored for step in model.trace)


def test_other_prompts_go_the_faster_way(swarm: LocalSwarm) -> None:
    model = swarm.model()
    answer(model, LONG, new_tokens=2)
    first = route_of(model)
    second = go_elsewhere(model, first, seed=1)
    make_slower(model, first, 0.0012)
    answer(model, prompt(200, seed=2)[0], new_tokens=2)
    assert route_of(model) == second


def test_a_far_slower_way_is_not_taken_for_a_prompt(swarm: LocalSwarm) -> None:
    model = swarm.model()
    answer(model, LONG, new_tokens=2)
    first = route_of(model)
    second = go_elsewhere(model, first, seed=1)
    make_slower(model, first, 60.0)
    answer(model, LONG, new_tokens=2)
    assert route_of(model) == second


def test_the_time_saved_is_that_of_the_shared_tokens_less_what_the_answer_costs() -> None:
    assert time_saved_s(1000, 0.01, 0.0) == 10.0
    assert time_saved_s(0, 0.01, 0.001) < 0
