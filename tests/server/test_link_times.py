"""How far the next servers are, as seen when sessions were linked to them."""

from __future__ import annotations

from swarmkit.net.registry.records import MAX_LINKS, MeasuredLink
from swarmkit.server.sessions.link_times import LinkTimes


class _Now:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_link_is_told_with_its_age() -> None:
    now = _Now()
    times = LinkTimes(now)
    times.note("b", 0.25)
    now.seconds += 5
    assert times.latest == (MeasuredLink("b", 0.25, 5.0),)


def test_links_that_were_used_last_are_kept() -> None:
    times = LinkTimes(_Now())
    for number in range(MAX_LINKS + 2):
        times.note(str(number), 0.1)
    assert [link.service_id for link in times.latest] == [str(n) for n in range(2, MAX_LINKS + 2)]


def test_one_slow_answer_is_not_believed_at_once() -> None:
    times = LinkTimes(_Now())
    for seconds in (0.1, 0.1, 0.1, 2.0):
        times.note("b", seconds)
    (link,) = times.latest
    assert 0.1 < link.round_trip_s < 1.0
