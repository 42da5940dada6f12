"""The view of a swarm is the same whatever the order of the news."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.swarm_map import SwarmMap

from .announcements import NOW, announcement

STATES = st.sampled_from(["joining", "online", "leaving"])


@st.composite
def news(draw: st.DrawFn) -> Announcement:
    start = draw(st.integers(0, 5))
    return announcement(
        draw(st.integers(0, 3)),
        service=draw(st.integers(0, 1)),
        start=start,
        stop=draw(st.integers(start + 1, 6)),
        state=draw(STATES),
        sequence=draw(st.integers(0, 3)),
        expires_at=NOW + draw(st.integers(-2, 2)),
    )


@given(st.data(), st.lists(news(), max_size=8))
def test_order_and_repetition_do_not_matter(data: st.DataObject, told: list[Announcement]) -> None:
    shuffled = data.draw(st.permutations(told)) + data.draw(
        st.lists(st.sampled_from(told)) if told else st.just([])
    )
    one_by_one = SwarmMap()
    for item in shuffled:
        one_by_one = one_by_one.apply(item)
    assert one_by_one == SwarmMap().apply(*told)


@given(st.lists(news(), max_size=8), st.lists(news(), max_size=8))
def test_maps_merge_as_if_all_had_been_told_to_one(
    here: list[Announcement], there: list[Announcement]
) -> None:
    merged = SwarmMap().apply(*here).apply(*SwarmMap().apply(*there).announcements.values())
    assert merged == SwarmMap().apply(*here, *there)


@pytest.mark.parametrize("order", [1, -1])
def test_the_later_word_of_a_peer_counts(order: int) -> None:
    words = [announcement(state="online", sequence=1), announcement(state="leaving", sequence=2)]
    assert [r.state for r in SwarmMap().apply(*words[::order]).announcements.values()] == ["leaving"]


def test_each_service_of_a_peer_has_a_word_of_its_own() -> None:
    words = [announcement(service=0, start=0, stop=2), announcement(service=1, start=4, stop=6)]
    assert [(r.start, r.stop) for r in SwarmMap().apply(*words).servers(NOW)] == [(0, 2), (4, 6)]


def test_a_peer_can_come_back() -> None:
    words = [announcement(state="leaving", sequence=1), announcement(state="online", sequence=2)]
    assert len(SwarmMap().apply(*words).servers(NOW)) == 1


def test_peers_do_not_overwrite_each_other() -> None:
    words = [announcement(0, sequence=9), announcement(1, sequence=1)]
    assert len(SwarmMap().apply(*words).servers(NOW)) == 2


def test_nothing_new_gives_the_very_same_map() -> None:
    known = SwarmMap().apply(announcement())
    assert known.apply(announcement(), announcement(sequence=1)) is known


def test_applying_leaves_the_old_map_as_it_was() -> None:
    old = SwarmMap()
    old.apply(announcement())
    assert not old.announcements


def test_a_map_cannot_be_written_to() -> None:
    view: Any = SwarmMap().apply(announcement()).announcements
    with pytest.raises(TypeError):
        view["somebody"] = announcement()


# reading


@pytest.mark.parametrize(("age", "seen"), [(59.0, 1), (60.0, 0), (61.0, 0)])
def test_servers_are_seen_until_they_expire(age: float, seen: int) -> None:
    assert len(SwarmMap().apply(announcement()).servers(NOW + age)) == seen


def test_an_old_word_does_not_come_back_when_the_later_one_expires() -> None:
    words = [
        announcement(state="online", sequence=1, expires_at=NOW + 60),
        announcement(state="leaving", sequence=2, expires_at=NOW + 10),
    ]
    assert SwarmMap().apply(*words).servers(NOW + 30) == []


def test_only_online_servers_are_used() -> None:
    words = [
        announcement(number, state=state) for number, state in enumerate(["joining", "online", "leaving"])
    ]
    assert [server.state for server in SwarmMap().apply(*words).servers(NOW)] == ["online"]


def test_other_states_are_shown_to_those_who_ask() -> None:
    words = [
        announcement(number, state=state) for number, state in enumerate(["joining", "online", "leaving"])
    ]
    found = SwarmMap().apply(*words).servers(NOW, ("joining", "leaving"))
    assert {server.state for server in found} == {"joining", "leaving"}


def test_servers_are_in_the_order_of_their_ids() -> None:
    found = SwarmMap().apply(*(announcement(number) for number in range(5))).servers(NOW)
    assert [server.peer_id for server in found] == sorted(server.peer_id for server in found)


def test_expired_words_can_be_dropped() -> None:
    words = [announcement(0, expires_at=NOW + 1), announcement(1, expires_at=NOW + 9)]
    assert len(SwarmMap().apply(*words).without_expired(NOW + 5).announcements) == 1


def test_dropping_nothing_gives_the_very_same_map() -> None:
    known = SwarmMap().apply(announcement())
    assert known.without_expired(NOW) is known


# what is missing


@pytest.mark.parametrize(
    ("ranges", "missing"),
    [
        ([], [(0, 6)]),
        ([(0, 6)], []),
        ([(0, 2), (4, 6)], [(2, 4)]),
        ([(2, 4)], [(0, 2), (4, 6)]),
        ([(0, 4), (1, 2)], [(4, 6)]),
        ([(3, 6), (0, 4)], []),
    ],
)
def test_blocks_that_nobody_serves_are_named(
    ranges: list[tuple[int, int]], missing: list[tuple[int, int]]
) -> None:
    words = [announcement(number, start=low, stop=high) for number, (low, high) in enumerate(ranges)]
    assert SwarmMap().apply(*words).missing_blocks(6, NOW) == missing


def test_blocks_of_servers_that_leave_are_missing() -> None:
    assert SwarmMap().apply(announcement(start=0, stop=6, state="leaving")).missing_blocks(6, NOW) == [(0, 6)]
