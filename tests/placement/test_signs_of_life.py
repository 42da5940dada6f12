"""Whom a server asks for a sign of life before it decides where to serve."""

from __future__ import annotations

import random

import pytest

from swarmkit.placement.description import Served
from swarmkit.placement.signs_of_life import ASKERS, GoneServers, gone, to_ask, without_replica


def spans(*ranges: tuple[int, int]) -> list[Served]:
    return [Served(start, stop, 1.0) for start, stop in ranges]


@pytest.mark.parametrize(
    ("servers", "alone"),
    [
        ([(0, 4), (4, 8)], [0, 1]),
        ([(0, 4), (0, 4), (4, 8)], [2]),
        ([(0, 5), (3, 8)], [0, 1]),
        ([(0, 8), (2, 6)], [0]),
        ([(0, 8), (0, 8)], []),
        ([(0, 4), (6, 20)], [0, 1]),
        ([], []),
    ],
)
def test_the_only_servers_of_some_block(servers: list[tuple[int, int]], alone: list[int]) -> None:
    assert without_replica(8, spans(*servers)) == alone


@pytest.mark.parametrize("servers", [ASKERS, 2 * ASKERS - 1])
def test_all_are_asked_in_a_small_swarm(servers: int) -> None:
    assert to_ask(8, spans(*[(0, 8)] * servers), (), (), random.Random(0).random) == list(range(servers))


def test_in_a_large_swarm_each_is_asked_by_a_few() -> None:
    servers, chance = spans(*[(0, 8)] * 1000), random.Random(0)
    turns = [len(to_ask(8, servers, (), (), chance.random)) for _ in range(1000)]
    assert sum(turns) / 1000 == pytest.approx(ASKERS, rel=0.1)


def test_if_all_answer_nobody_else_is_asked() -> None:
    assert to_ask(8, spans((0, 8), (0, 4), (4, 8)), {0}, (), random.random) == []


def test_if_one_is_silent_those_that_stand_alone_without_it_are_asked() -> None:
    servers = spans((0, 4), (0, 4), (4, 8), (4, 8))
    assert to_ask(8, servers, {0}, {0}, random.random) == [1]


def test_the_questions_end() -> None:
    servers = spans((0, 4), (0, 4), (4, 8))
    assert to_ask(8, servers, {0, 1}, {0, 1}, random.random) == [2]
    assert to_ask(8, servers, {0, 1, 2}, {0, 1}, random.random) == []


@pytest.mark.parametrize(
    ("asked", "silent", "away"), [({1, 2, 3}, {2}, {2}), ({1}, {1}, {1}), ({1, 2, 3}, {1, 2, 3}, set())]
)
def test_where_several_are_silent_and_none_answers_nothing_is_concluded(
    asked: set[int], silent: set[int], away: set[int]
) -> None:
    assert set(gone(asked, silent)) == away


def test_who_was_found_gone_is_known_at_the_next_look() -> None:
    known = GoneServers()
    known.note([("b", 7)])
    assert known.among([("a", 3), ("b", 7)]) == {1}


def test_who_announces_itself_anew_is_there_again() -> None:
    known = GoneServers()
    known.note([("a", 7)])
    assert known.among([("a", 8)]) == set()
    assert known.among([("a", 7)]) == set()  # an old copy of the announcement came late
