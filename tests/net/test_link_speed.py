"""A link's speed, from when messages were sent and when they came."""

from __future__ import annotations

import pytest

from swarmkit.net.protocol.link_speed import LARGE_BYTES, SMALL_BYTES, LinkSpeed

SPEED, DELAY, OFFSET = 1e6, 0.05, -1234.5
"""Bytes/s; seconds; the sender's clock to ours."""


class Way:
    """A link, in order, and whoever measures it."""

    def __init__(self) -> None:
        self.speed = LinkSpeed()
        self.free_at = 0.0

    def send(self, at: float, nbytes: int, held_up_s: float = 0.0, read_from: float = -10.0) -> None:
        """Args: read_from: after the sending, on the same clock."""
        self.free_at = max(at, self.free_at) + nbytes / SPEED
        begun = at + read_from + OFFSET
        arrived = max(self.free_at + DELAY + held_up_s + OFFSET, begun)
        self.speed.observe(nbytes, at, arrived, begun)


@pytest.fixture
def way() -> Way:
    way = Way()
    way.send(0.0, 100)
    return way


def test_nothing_is_known_at_first(way: Way) -> None:
    assert way.speed.bytes_per_s is None


def test_one_message_alone_is_not_believed(way: Way) -> None:
    way.send(1.0, 10**6)
    assert way.speed.bytes_per_s is None


def test_clocks_need_not_agree(way: Way) -> None:
    for at in (1.0, 5.0):
        way.send(at, 10**6)
    assert way.speed.bytes_per_s == pytest.approx(SPEED, rel=0.01)


def test_what_waits_behind_another_message_is_measured_from_there(way: Way) -> None:
    for at in (1.0, 1.001, 1.002):
        way.send(at, 10**6)
    assert way.speed.bytes_per_s == pytest.approx(SPEED, rel=0.01)


def test_a_message_that_was_held_up_does_not_make_a_link_slow(way: Way) -> None:
    for at, held_up_s in ((1.0, 0.0), (5.0, 30.0), (50.0, 3.0)):
        way.send(at, 10**6, held_up_s)
    assert way.speed.bytes_per_s == pytest.approx(SPEED, rel=0.01)


def test_a_message_that_lay_there_until_it_was_read_tells_nothing(way: Way) -> None:
    for at in (1.0, 10.0, 20.0):
        way.send(at, 10**6, read_from=5.0)
    assert way.speed.bytes_per_s is None


def test_who_comes_to_read_a_little_late_has_waited_for_most_of_it(way: Way) -> None:
    for at in (1.0, 10.0):
        way.send(at, 10**6, read_from=0.3)
    assert way.speed.bytes_per_s == pytest.approx(SPEED, rel=0.01)


def test_a_link_that_became_slow_is_noticed(way: Way) -> None:
    for at in (1.0, 5.0):
        way.send(at, 10**6)
    for at in (10.0, 20.0, 30.0, 40.0):
        way.send(at, 10**6, held_up_s=9.0)
    assert way.speed.bytes_per_s == pytest.approx(SPEED / 10, rel=0.01)


@pytest.mark.parametrize("nbytes", [SMALL_BYTES, LARGE_BYTES - 1])
def test_steps_of_a_token_say_nothing_of_speed(way: Way, nbytes: int) -> None:
    for at in (1.0, 2.0, 3.0):
        way.send(at, nbytes)
    assert way.speed.bytes_per_s is None


def test_steps_of_a_token_keep_the_delay_known_once_the_speed_is(way: Way) -> None:
    for at in (1.0, 5.0):
        way.send(at, 10**6)
    for at in range(10, 300, 10):
        way.send(at, LARGE_BYTES - 1)
    for at in (300.0, 305.0, 310.0, 315.0):
        way.send(at, 10**5)
    assert way.speed.bytes_per_s == pytest.approx(SPEED, rel=0.02)


def test_without_a_late_small_message_nothing_can_be_told(way: Way) -> None:
    for at in (100.0, 110.0):  # clocks may have drifted apart
        way.send(at, 10**6)
    assert way.speed.bytes_per_s is None


def test_a_fast_link_is_no_slower_than_the_event_loops_noise(way: Way) -> None:
    speed = LinkSpeed()
    speed.observe(0, 1.0, 1.0)
    for at in (2.0, 3.0):
        speed.observe(LARGE_BYTES, at, at + 0.0009)
    assert speed.bytes_per_s is not None
    assert speed.bytes_per_s > 5e7
