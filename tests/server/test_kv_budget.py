"""Every byte of the cache is leased or free."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.server.cache.kv_budget import CacheFullError, KVBudget

PAGE = PAGE_TOKENS  # bytes, at one byte for a token


def test_a_new_lease_holds_nothing() -> None:
    budget = KVBudget(10 * PAGE)
    assert budget.lease(1).nbytes == 0


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (PAGE_TOKENS, 1), (PAGE_TOKENS + 1, 2)])
def test_a_lease_holds_whole_pages(tokens: int, pages: int) -> None:
    lease = KVBudget(10 * PAGE).lease(1)
    lease.resize(1, tokens)
    assert lease.nbytes == pages * PAGE


def test_every_row_has_pages_of_its_own() -> None:
    lease = KVBudget(10 * PAGE).lease(1)
    lease.resize(3, 1)
    assert lease.nbytes == 3 * PAGE


def test_a_row_holds_its_states_besides_its_pages() -> None:
    budget = KVBudget(100 * PAGE)
    budget.row_tokens = 7
    lease = budget.lease(2)
    lease.resize(3, 1)
    assert lease.nbytes == 3 * 2 * (7 + PAGE_TOKENS)


def test_without_tokens_there_are_no_states() -> None:
    budget = KVBudget(100 * PAGE)
    budget.row_tokens = 7
    lease = budget.lease(1)
    lease.resize(3, 1)
    lease.resize(3, 0)
    assert lease.nbytes == 0


def test_a_page_is_larger_where_a_token_takes_more() -> None:
    lease = KVBudget(10 * PAGE).lease(5)
    lease.resize(1, 1)
    assert lease.nbytes == 5 * PAGE


def test_resize_gives_back_what_is_not_needed() -> None:
    lease = KVBudget(10 * PAGE).lease(1)
    lease.resize(4, 1)
    lease.resize(1, 1)
    assert lease.nbytes == PAGE


def test_grow_never_shrinks() -> None:
    lease = KVBudget(10 * PAGE).lease(1)
    lease.grow(4, 1)
    lease.grow(1, 1)
    assert lease.nbytes == 4 * PAGE


def test_the_last_byte_can_be_leased() -> None:
    budget = KVBudget(2 * PAGE)
    budget.lease(1).resize(2, PAGE_TOKENS)
    assert budget.free_bytes == 0


def test_more_than_is_free_is_refused_with_the_numbers() -> None:
    budget = KVBudget(2 * PAGE)
    budget.lease(1).resize(1, 1)
    with pytest.raises(CacheFullError, match=f"{PAGE} of {2 * PAGE} bytes left, {2 * PAGE} are needed"):
        budget.lease(1).resize(2, 1)


def test_a_refused_lease_stays_as_it_was() -> None:
    budget = KVBudget(2 * PAGE)
    lease = budget.lease(1)
    lease.resize(1, 1)
    with pytest.raises(CacheFullError):
        lease.grow(3, 1)
    assert (lease.nbytes, budget.leased_bytes) == (PAGE, PAGE)


def test_release_gives_everything_back() -> None:
    budget = KVBudget(2 * PAGE)
    lease = budget.lease(1)
    lease.resize(2, 1)
    lease.release()
    assert budget.free_bytes == 2 * PAGE


def test_release_may_be_called_twice() -> None:
    budget = KVBudget(2 * PAGE)
    lease, other = budget.lease(1), budget.lease(1)
    lease.resize(1, 1)
    other.resize(1, 1)
    lease.release()
    lease.release()
    assert budget.leased_bytes == PAGE


def test_a_released_lease_cannot_grow() -> None:
    lease = KVBudget(2 * PAGE).lease(1)
    lease.release()
    with pytest.raises(AssertionError):
        lease.resize(1, 1)


def test_an_audit_finds_bytes_that_nobody_holds() -> None:
    budget = KVBudget(2 * PAGE)
    lease = budget.lease(1)
    lease.nbytes = 1
    with pytest.raises(AssertionError, match="add up to 1"):
        budget.audit()


Move = tuple[str, int, int, int]
MOVES = st.lists(
    st.tuples(st.sampled_from(["grow", "resize", "release"]), *[st.integers(0, 3)] * 2, st.integers(0, 99))
)


@given(MOVES)
def test_whatever_happens_the_books_balance(moves: list[Move]) -> None:
    budget = KVBudget(8 * PAGE)
    leases = [budget.lease(1) for _ in range(4)]
    for what, number, rows, tokens in moves:
        lease = leases[number]
        if what == "release":
            lease.release()
            leases[number] = budget.lease(1)
            continue
        with contextlib.suppress(CacheFullError):
            getattr(lease, what)(rows, tokens)
        budget.audit()
    for lease in leases:
        lease.release()
    budget.audit()
    assert budget.leased_bytes == 0
