"""What was sent to a stage, so that its cache can be rebuilt elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.client.session.history import History

WIDTH = 2


def some(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def holding(hidden: torch.Tensor) -> History:
    history = History()
    history.write(0, hidden)
    return history


def test_a_new_history_holds_nothing() -> None:
    assert (History().tokens, History().nbytes) == (0, 0)


def test_what_was_written_is_read() -> None:
    hidden = some(2, 3)
    assert torch.equal(holding(hidden).read(0, 3), hidden)


def test_a_part_is_read_in_one_piece() -> None:
    hidden = some(2, 5)
    part = holding(hidden).read(1, 4)
    assert torch.equal(part, hidden[:, 1:4])
    assert part.is_contiguous()


def test_what_follows_is_appended() -> None:
    history = holding(some(2, 3))
    history.write(3, some(2, 1, 1))
    assert torch.equal(history.read(0, 4), torch.cat([some(2, 3), some(2, 1, 1)], dim=1))


def test_writing_at_an_earlier_position_forgets_what_came_after() -> None:
    history = holding(some(2, 5))
    history.write(2, some(2, 1, 1))
    assert history.tokens == 3


def test_what_was_written_is_a_copy() -> None:
    hidden = some(1, 1)
    history = holding(hidden)
    before = hidden.clone()
    hidden.zero_()
    assert torch.equal(history.read(0, 1), before)


def test_beginning_anew_may_be_with_another_batch() -> None:
    history = holding(some(2, 3))
    history.write(0, some(5, 1, 1))
    assert torch.equal(history.read(0, 1), some(5, 1, 1))


def test_a_gap_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="position 5 is beyond the 3 tokens"):
        holding(some(1, 3)).write(5, some(1, 1))


@pytest.mark.parametrize("tokens", [0, 2, 3, 9])
def test_crop_keeps_at_most_so_many(tokens: int) -> None:
    history = holding(some(1, 3))
    history.crop(tokens)
    assert history.tokens == min(tokens, 3)


def test_what_was_cropped_cannot_be_read() -> None:
    history = holding(some(1, 3))
    history.crop(2)
    with pytest.raises(ValueError, match="0:3 are not in a history of 2 tokens"):
        history.read(0, 3)


@pytest.mark.parametrize("order", [[1, 0], [0, 0, 1], [1]])
def test_rows_are_reordered(order: list[int]) -> None:
    history = holding(some(2, 3))
    history.reorder(order)
    assert torch.equal(history.read(0, 3), some(2, 3)[order])


def test_nothing_can_be_reordered() -> None:
    history = History()
    history.reorder([0, 0])
    assert history.tokens == 0


def test_one_token_at_a_time_does_not_copy_all_of_it_each_time() -> None:
    history, buffers = holding(some(1, 1)), set()
    for position in range(1, 1000):
        history.write(position, some(1, 1))
        buffers.add(history.nbytes)
    assert len(buffers) <= 5


moves = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 9), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("reorder"), st.integers(0, 1), st.integers(0, 1)),
)


@given(st.lists(moves, max_size=12))
def test_it_is_what_a_list_of_tensors_would_be(done: list[tuple[str, int, int]]) -> None:
    """Compared with the plainest form that there could be."""
    history, plain = History(), torch.empty(2, 0, WIDTH)
    for number, (what, first, second) in enumerate(done):
        position = plain.shape[1] * first // 9  # somewhere from the beginning to the end
        if what == "write":
            hidden = some(2, second, number)
            history.write(position, hidden)
            plain = torch.cat([plain[:, :position], hidden], dim=1)
        elif what == "crop":
            history.crop(position)
            plain = plain[:, :position]
        else:
            history.reorder([first, second])
            plain = plain[[first, second]]
    assert history.tokens == plain.shape[1]
    if plain.shape[1]:
        assert torch.equal(history.read(0, plain.shape[1]), plain)
