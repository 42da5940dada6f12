"""A session that begins like an earlier one sends only the rest, whatever becomes of the servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.settings import ServerSettings

from .answers import answer, at, prompt
from .recovery import World, a_world, assert_same

LONG = prompt(100)[0]
NEW = 6


@pytest.fixture(scope="module")
def wanted(tiny_llama: Checkpoint) -> Tensor:
    """What the local model answers to the second turn."""
    local = load_local(tiny_llama)
    tokens: Tensor = answer(local, second_turn(answer(local, LONG, new_tokens=NEW)), new_tokens=NEW)
    return tokens


@pytest.fixture
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    with a_world(tiny_llama) as world:
        yield world


def second_turn(said: Tensor) -> Tensor:
    return torch.cat([said, prompt(9, seed=8)[0]], dim=1)


def two_turns(world: World, between: Callable[[], object] = lambda: None, **options: object) -> Tensor:
    question = second_turn(answer(world.model, LONG, new_tokens=NEW))
    between()
    tokens: Tensor = answer(world.model, question, new_tokens=NEW, **options)
    return tokens


def first_step(world: World) -> tuple[int, int]:
    """Tokens that the latest answer's first step recalled, and sent."""
    step = next(step for step in reversed(world.client.trace) if step.tokens > 1)
    return step.restored, step.tokens


def test_a_second_turn_sends_only_what_is_new(world: World, wanted: Tensor) -> None:
    tokens = two_turns(world)
    assert first_step(world) == (96, LONG.shape[1] + NEW + 9 - 96)
    assert_same(tokens, wanted)


def test_all_logits_are_those_of_the_whole_prompt(tiny_llama: Checkpoint, world: World) -> None:
    answer(world.model, LONG, new_tokens=NEW)
    with torch.no_grad():
        logits = world.model(LONG).logits
        assert torch.allclose(logits, load_local(tiny_llama)(LONG).logits, atol=1e-4)
    assert world.client.trace[-1].restored == 96


def test_another_prompt_sends_everything(world: World) -> None:
    answer(world.model, LONG, new_tokens=NEW)
    answer(world.model, prompt(100, seed=4)[0], new_tokens=NEW)
    assert first_step(world) == (0, 100)


def test_nothing_is_recalled_where_servers_keep_nothing(tiny_llama: Checkpoint, wanted: Tensor) -> None:
    with a_world(tiny_llama, server_settings=ServerSettings().replace(prefix_cache="off")) as world:
        assert_same(two_turns(world), wanted)
        assert first_step(world)[0] == 0


def test_nothing_is_remembered_if_so_wished(tiny_llama: Checkpoint, wanted: Tensor) -> None:
    with a_world(tiny_llama, prefix_cache_bytes=0) as world:
        assert_same(two_turns(world), wanted)
        assert first_step(world)[0] == 0


def test_several_rows_are_not_remembered(world: World) -> None:
    ids = LONG.repeat(2, 1)
    answer(world.model, ids, new_tokens=NEW)
    answer(world.model, ids, new_tokens=NEW)
    assert first_step(world) == (0, 100)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_server_that_dies_after_it_was_used_again(world: World, wanted: Tensor, stage: int) -> None:
    tokens = two_turns(world, logits_processor=at({2: lambda: world.in_use(stage).kill()}))
    assert len(world.lost()) == 1
    assert_same(tokens, wanted)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_server_that_died_between_the_turns(world: World, wanted: Tensor, stage: int) -> None:
    assert_same(two_turns(world, lambda: world.in_use(stage).kill()), wanted)


def test_all_servers_but_new_ones_are_gone(tiny_llama: Checkpoint, wanted: Tensor) -> None:
    with a_world(tiny_llama, replicas=1) as world:

        def exchange() -> None:
            old = list(world.swarm.servers)
            world.add((0, 2), (2, 5))
            for server in old:
                server.stop()
            world.look()

        assert_same(two_turns(world, exchange), wanted)


def test_what_servers_said_they_kept_is_bounded_by_what_was_asked(world: World, wanted: Tensor) -> None:
    from swarmkit.server.cache.prefix_tracker import PrefixTracker

    recall = PrefixTracker.recall
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixTracker, "recall", lambda *given: recall(*given) + 32)
        assert_same(two_turns(world), wanted)
    assert first_step(world)[0] == 0
