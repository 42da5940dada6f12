"""Pages that are kept after use: names, the order in which they go, and the room that they take."""

from __future__ import annotations

import pytest
import torch

from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.kv.pages import names_of
from swarmkit.server.cache.kv_budget import KVBudget
from swarmkit.server.cache.prefix_cache import Page, PrefixCache, root_of

ROOT = root_of("somebody", 0, 2)
PAGE_BYTES = 3 * PAGE_TOKENS * 4


def inputs(pages: float, seed: int = 0) -> torch.Tensor:
    tokens = int(pages * PAGE_TOKENS)
    return torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))


def page() -> Page:
    part = torch.zeros(1, 1, PAGE_TOKENS, 1)
    return Page(((part, part.clone()),), torch.zeros(PAGE_TOKENS, 1))


def kept(pages: PrefixCache, names: list[bytes]) -> list[bool]:
    return [name in pages for name in names]


def test_only_full_pages_have_names() -> None:
    assert len(names_of(ROOT, inputs(2.9))) == 2


def test_a_longer_text_begins_with_the_same_names() -> None:
    assert names_of(ROOT, inputs(3))[:2] == names_of(ROOT, inputs(3)[: 2 * PAGE_TOKENS])


def test_names_go_on_behind_a_page() -> None:
    whole = names_of(ROOT, inputs(3))
    assert names_of(whole[0], inputs(3)[PAGE_TOKENS:]) == whole[1:]


@pytest.mark.parametrize("token", [0, PAGE_TOKENS - 1])
def test_one_other_token_changes_all_names_from_there_on(token: int) -> None:
    other = inputs(3)
    other[PAGE_TOKENS + token, 0] += 1
    assert [a == b for a, b in zip(names_of(ROOT, other), names_of(ROOT, inputs(3)), strict=True)] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("other", [root_of("another", 0, 2), root_of("somebody", 1, 2), root_of("", 0, 2)])
def test_others_and_other_blocks_have_other_names(other: bytes) -> None:
    assert names_of(other, inputs(1)) != names_of(ROOT, inputs(1))


def test_what_was_put_is_found() -> None:
    pages, one = PrefixCache(PAGE_BYTES), page()
    pages.put(b"one", one)
    assert pages.find([b"one"]) == [one]


def test_nothing_is_found_behind_a_gap() -> None:
    pages = PrefixCache(9 * PAGE_BYTES)
    pages.put(b"two", page())
    assert pages.find([b"one", b"two"]) == []


def test_the_least_recently_used_goes_first() -> None:
    pages = PrefixCache(2 * PAGE_BYTES)
    pages.put(b"one", page())
    pages.put(b"two", page())
    pages.find([b"one"])
    pages.put(b"three", page())
    assert kept(pages, [b"one", b"two", b"three"]) == [True, False, True]


def test_of_a_text_the_end_goes_first() -> None:
    pages = PrefixCache(3 * PAGE_BYTES)
    names = [b"one", b"two", b"three"]
    for name in names:
        pages.put(name, page())
    pages.find(names)
    pages.set_limit(2 * PAGE_BYTES)
    assert kept(pages, names) == [True, True, False]


def test_a_page_that_does_not_fit_is_not_kept() -> None:
    pages = PrefixCache(PAGE_BYTES - 1)
    pages.put(b"one", page())
    assert len(pages) == 0


def test_pages_make_room_for_a_lease() -> None:
    budget = KVBudget(3 * PAGE_BYTES)
    for name in (b"one", b"two", b"three"):
        budget.pages.put(name, page())
    budget.lease(1).resize(1, PAGE_TOKENS)
    assert (budget.pages.nbytes, budget.leased_bytes) == (2 * PAGE_BYTES, PAGE_TOKENS)


def test_pages_take_no_room_that_is_leased() -> None:
    budget = KVBudget(2 * PAGE_BYTES)
    budget.lease(1).resize(1, PAGE_TOKENS)
    for name in (b"one", b"two"):
        budget.pages.put(name, page())
    budget.audit()
    assert len(budget.pages) == 1


def test_kept_pages_count_as_free() -> None:
    budget = KVBudget(2 * PAGE_BYTES)
    budget.pages.put(b"one", page())
    assert budget.free_bytes == 2 * PAGE_BYTES


def test_an_ended_lease_gives_pages_room_again() -> None:
    budget = KVBudget(PAGE_BYTES)
    lease = budget.lease(1)
    lease.resize(1, PAGE_TOKENS)
    lease.release()
    budget.pages.put(b"one", page())
    assert len(budget.pages) == 1
