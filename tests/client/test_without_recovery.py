"""Sessions that keep nothing to survive with, as their user wished: as good, while all goes well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from swarmkit.errors import PeerError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

from .answers import answer, prompt
from .recovery import NEW_TOKENS, World, a_world, assert_same


@pytest.fixture
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    with a_world(tiny_llama, recovery=False, prefix_cache_bytes=0) as world:
        yield world


@pytest.fixture(scope="module")
def wanted(tiny_llama: Checkpoint) -> Tensor:
    tokens: Tensor = answer(load_local(tiny_llama), *prompt(7), new_tokens=NEW_TOKENS)
    return tokens


def test_the_tokens_are_the_same(world: World, wanted: Tensor) -> None:
    assert_same(world.answer(), wanted)


@pytest.mark.parametrize("way", ["beams", "left-padded batch", "prompt lookup"])
def test_every_way_to_generate_works_without_recovery(world: World, way: str) -> None:
    assert world.answer(way).shape[1] == 7 + NEW_TOKENS


def test_only_the_last_server_sends_its_outputs_here(world: World) -> None:
    world.answer()
    received = [[hop.received_bytes for hop in step.hops] for step in world.client.trace]
    assert [[bool(nbytes) for nbytes in step] for step in received] == [[False, False, True]] * len(received)


def test_a_client_without_recovery_keeps_no_history(world: World) -> None:
    with world.model.session() as session:
        world.answer()
        assert session.chain.history_bytes <= prompt(7)[0].shape[1] * world.client.model.hidden_size * 4


def test_a_lost_server_ends_the_session(world: World) -> None:
    with pytest.raises(PeerError):
        world.answer(actions={2: lambda: world.in_use(1).kill()})


def test_a_server_that_is_not_there_at_the_beginning_is_gone_round(world: World, wanted: Tensor) -> None:
    world.answer()
    world.in_use(1).kill()
    assert_same(world.answer(), wanted)
