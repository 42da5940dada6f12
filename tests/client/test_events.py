"""What a model tells of its steps and its training, to whoever subscribes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from swarmkit.events import Event, MicroBatchFinished, RoutePlanned, StepFinished
from swarmkit.models.checkpoint.checkpoint import Checkpoint

from .recovery import NEW_TOKENS, World, a_world


@pytest.fixture(scope="module")
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    with a_world(tiny_llama, replicas=1) as world:
        yield world


@pytest.fixture(scope="module")
def told(world: World) -> list[Event]:
    """Of one answer."""
    with world.model.subscribe() as subscription:
        world.answer()
    return subscription.pending()


@pytest.fixture(scope="module")
def steps(told: list[Event]) -> list[StepFinished]:
    return [event for event in told if isinstance(event, StepFinished)]


def test_a_session_tells_its_route_and_then_every_step(told: list[Event]) -> None:
    assert [type(event) for event in told] == [RoutePlanned, *[StepFinished] * NEW_TOKENS]


def test_steps_follow_each_other_in_position_and_time(steps: list[StepFinished]) -> None:
    ends = [step.position + step.tokens for step in steps]
    assert [step.position for step in steps[1:]] == ends[:-1]
    assert sorted(step.time for step in steps) == [step.time for step in steps]


def test_all_events_of_a_session_have_one_owner(world: World, told: list[Event]) -> None:
    (owner,) = {event.owner for event in told}
    assert owner.kind == "session"
    assert owner.peer_id not in {server.peer_id for server in world.swarm.servers}


def test_the_times_of_a_steps_hops_are_parts_of_its_own(steps: list[StepFinished]) -> None:
    for step in steps:
        assert [(hop.start, hop.stop) for hop in step.hops] == [(0, 1), (1, 3), (3, 5)]
        assert 0 < sum(hop.total_ms for hop in step.hops) <= step.total_ms


def test_another_session_has_another_owner(world: World, told: list[Event]) -> None:
    with world.model.subscribe(8, RoutePlanned) as subscription:
        world.answer()
    (planned,) = subscription.pending()
    assert planned.owner != told[0].owner


def test_training_tells_every_micro_batch_forward_and_backward(world: World) -> None:
    hidden = torch.randn(4, 48, world.client.model.hidden_size, requires_grad=True)
    with world.model.subscribe(64, MicroBatchFinished) as subscription:
        world.model.blocks(hidden).sum().backward()
    told = [event for event in subscription.pending() if isinstance(event, MicroBatchFinished)]
    for direction in ("forward", "backward"):
        those = [event for event in told if event.direction == direction]
        assert sorted(event.index for event in those) == list(range(len(those)))
        assert sum(event.tokens for event in those) == 4 * 48
        assert {(event.start, event.stop, len(event.route)) for event in those} == {(0, 5, 3)}
