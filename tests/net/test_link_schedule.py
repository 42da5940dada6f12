"""The arithmetic of a link, on a clock that stands in the test."""

from __future__ import annotations

import math

import pytest

from swarmkit.errors import UsageError
from swarmkit.net.emulation.link_schedule import EmulatedLink, LinkSchedule

KILOBIT_PER_S = 1e3  # at this rate 125 bytes take a second


def arrivals(link: EmulatedLink, *pieces: tuple[int, float], seed: int = 0) -> list[float]:
    """When pieces (bytes, time) arrive."""
    schedule = LinkSchedule(link, seed)
    return [schedule.admit(nbytes, now) for nbytes, now in pieces]


def test_a_plain_link_passes_everything_on_at_once() -> None:
    assert arrivals(EmulatedLink(), (10**9, 1.0), (1, 1.0), (1, 2.5)) == [1.0, 1.0, 2.5]


def test_a_delay_is_added_to_each_piece() -> None:
    assert arrivals(EmulatedLink(delay_s=0.25), (100, 1.0), (100, 2.0)) == [1.25, 2.25]


def test_a_piece_arrives_when_its_last_byte_is_through() -> None:
    assert arrivals(EmulatedLink(bandwidth=KILOBIT_PER_S), (125, 1.0)) == [2.0]


def test_delay_comes_after_the_transfer() -> None:
    assert arrivals(EmulatedLink(bandwidth=KILOBIT_PER_S, delay_s=0.5), (250, 1.0)) == [3.5]


def test_pieces_wait_for_those_before_them() -> None:
    assert arrivals(EmulatedLink(bandwidth=KILOBIT_PER_S), (125, 1.0), (125, 1.0), (250, 1.5)) == [
        2.0,
        3.0,
        5.0,
    ]


def test_an_idle_link_saves_nothing_up() -> None:
    assert arrivals(EmulatedLink(bandwidth=KILOBIT_PER_S), (125, 1.0), (125, 100.0)) == [2.0, 101.0]


def test_delays_overlap_but_transfers_do_not() -> None:
    assert arrivals(EmulatedLink(bandwidth=KILOBIT_PER_S, delay_s=10), (125, 0.0), (125, 0.0)) == [11.0, 12.0]


def test_cutting_a_message_into_pieces_does_not_change_when_its_end_arrives() -> None:
    link = EmulatedLink(bandwidth=KILOBIT_PER_S, delay_s=0.5)
    assert arrivals(link, *[(25, 0.0)] * 5)[-1] == pytest.approx(arrivals(link, (125, 0.0))[0])


def test_jitter_lies_between_nothing_and_its_bound() -> None:
    found = arrivals(EmulatedLink(delay_s=1, jitter_s=0.5), *[(1, 0.0)] * 200)
    assert 1 <= min(found) < 1.05
    assert 1.45 < max(found) <= 1.5


def test_jitter_comes_again_with_the_same_seed_only() -> None:
    link, pieces = EmulatedLink(jitter_s=1), [(1, 0.0)] * 3
    assert arrivals(link, *pieces, seed=7) == arrivals(link, *pieces, seed=7)
    assert arrivals(link, *pieces, seed=7) != arrivals(link, *pieces, seed=8)


def test_another_link_takes_over_where_the_first_is_busy() -> None:
    schedule = LinkSchedule(EmulatedLink(bandwidth=KILOBIT_PER_S))
    schedule.admit(250, 0.0)
    schedule.link = EmulatedLink(bandwidth=2 * KILOBIT_PER_S)
    assert schedule.admit(250, 0.0) == 3.0


def test_the_window_holds_the_queue_and_what_fits_on_the_wire() -> None:
    assert EmulatedLink(delay_s=2, jitter_s=1, bandwidth=8000, queue_bytes=500).window_bytes == 3500


def test_the_window_of_an_unlimited_link_is_limited_all_the_same() -> None:
    assert EmulatedLink(delay_s=1, queue_bytes=500).window_bytes == 16 * 1024 * 1024 + 500


@pytest.mark.parametrize(
    "impossible", [{"delay_s": -0.1}, {"jitter_s": -1}, {"bandwidth": 0}, {"queue_bytes": 0}]
)
def test_what_no_link_can_be_is_refused(impossible: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="a link needs"):
        EmulatedLink(**impossible)  # type: ignore[arg-type]


def test_an_unlimited_link_is_never_busy() -> None:
    assert EmulatedLink(bandwidth=math.inf).transfer_s(10**12) == 0
