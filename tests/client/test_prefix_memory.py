"""What is remembered of sessions that have ended, and where a session begins that begins alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swarmkit.client.swarm.prefix_cache import Chain, ClientPrefixCache, best_start
from swarmkit.models.kv.cache import PAGE_TOKENS

BOUNDARIES = [0, 2, 4]
CHAIN = (("a", 0, 2), ("b", 2, 4))
WIDTH = 4


def states(pages: float, seed: int = 0) -> dict[int, Tensor]:
    """A session's states at all boundaries; a longer one of the same seed begins with a shorter one's."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(16 * PAGE_TOKENS, WIDTH, generator=generator)
    return {boundary: whole[: int(pages * PAGE_TOKENS)] + boundary for boundary in BOUNDARIES}


def nbytes(pages: float) -> int:
    return 3 * int(pages * PAGE_TOKENS) * WIDTH * 4


def found(memory: ClientPrefixCache, pages: float, seed: int = 0, chain: Chain = CHAIN) -> int:
    """How many tokens are remembered of a session that begins so."""
    entry = memory.find(chain, states(pages, seed)[0])
    return 0 if entry is None else entry[1]


def test_what_was_kept_is_found() -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2))
    assert found(memory, 2) == 2 * PAGE_TOKENS


def test_only_full_pages_count() -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2.5))
    assert found(memory, 3) == 2 * PAGE_TOKENS


def test_what_begins_in_another_way_is_not_found() -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2))
    assert found(memory, 2, seed=1) == 0


def test_the_states_found_are_those_that_were_kept() -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2))
    entry = memory.find(CHAIN, states(3)[0])
    assert entry is not None
    assert torch.equal(entry[0].states[2], states(2)[2])


@pytest.mark.parametrize(
    "other",
    [
        (("a", 0, 3), ("b", 3, 4)),  # other blocks
        (("c", 0, 2), ("b", 2, 4)),  # another server in front
        (("a", 0, 2), ("c", 2, 4)),  # another one behind
        (("a", 0, 4),),
    ],
)
def test_what_some_servers_computed_is_not_used_with_others(other: Chain) -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2))
    assert found(memory, 2, chain=other) == 0


@pytest.mark.parametrize("look_between", [False, True])
def test_what_a_dropped_server_took_part_in_is_forgotten(look_between: bool) -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2, seed=0))
    memory.keep((("a", 0, 4),), states(2, seed=1))
    if look_between:
        found(memory, 1)
    memory.drop("b")
    assert [found(memory, 2), found(memory, 2, seed=1, chain=(("a", 0, 4),))] == [0, 2 * PAGE_TOKENS]
    assert memory.nbytes == nbytes(2)


def test_a_cleared_memory_holds_nothing() -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2, seed=0))
    found(memory, 2)
    memory.keep(CHAIN, states(2, seed=1))
    memory.clear()
    assert (found(memory, 2), found(memory, 2, seed=1), memory.nbytes, len(memory)) == (0, 0, 0, 0)


def test_a_session_that_went_on_takes_the_place_of_its_beginning() -> None:
    memory = ClientPrefixCache(nbytes(9))
    memory.keep(CHAIN, states(2))
    memory.keep(CHAIN, states(3))
    assert found(memory, 9) == 3 * PAGE_TOKENS
    assert len(memory) == 1


@pytest.mark.parametrize("look_between", [False, True])
def test_it_never_takes_more_than_its_limit(look_between: bool) -> None:
    memory = ClientPrefixCache(nbytes(3))
    for seed in range(4):
        memory.keep(CHAIN, states(1.5, seed))
        if look_between:
            found(memory, 1)
    assert memory.nbytes <= nbytes(3)


def test_the_least_recently_used_goes_first() -> None:
    memory = ClientPrefixCache(nbytes(2))
    memory.keep(CHAIN, states(1, 0))
    memory.keep(CHAIN, states(1, 1))
    found(memory, 1, 0)
    memory.keep(CHAIN, states(1, 2))
    assert [found(memory, 1, seed) > 0 for seed in (0, 1, 2)] == [True, False, True]


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    memory = ClientPrefixCache(nbytes(2) - 1)
    memory.keep(CHAIN, states(2))
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("held", "known", "tokens", "begin"),
    [
        ([64, 64], 64, 100, 64),  # all have it
        ([0, 0], 64, 100, 0),  # none has it: they work on all of it at once
        ([64, 32], 64, 100, 32),  # what all have, and the rest at once
        ([64, 64, 64, 0], 64, 1000, 0),  # one alone would hold up the others for longer
        ([960, 960, 0], 960, 1000, 0),  # 40 + 40 + 1000 > 1000
        ([96, 64], 64, 100, 64),  # more than is known here cannot be used
    ],
)
def test_where_a_step_begins(held: list[int], known: int, tokens: int, begin: int) -> None:
    assert best_start(held, known, tokens) == begin
