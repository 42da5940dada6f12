"""How much longer than usual is the way from one server to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from swarmkit.client.routing.detours import detours
from swarmkit.events import HopTrace, Owner, StepFinished
from swarmkit.net.registry.records import Announcement, MeasuredLink

from ..net.announcements import announcement

WAY_S = 0.02


def server(name: str, **changes: Any) -> Announcement:
    return announcement(peer_id=name, **changes)


def step(*hops: tuple[str, float, int], tokens: int = 1) -> StepFinished:
    """A step over servers, each with its milliseconds of network and the bytes that the client sent it."""
    traces = tuple(HopTrace(name, name, 0, 1, 0.0, 1.0, ms, sent) for name, ms, sent in hops)
    return StepFinished(5, 1, tokens, 9.0, traces, time=0.0, owner=Owner("session", "me"))


def found(steps: Sequence[StepFinished], *servers: Announcement) -> dict[tuple[str, str], float]:
    return detours(steps, servers, lambda name: WAY_S)


def test_nothing_is_known_at_first() -> None:
    assert found([], server("a"), server("b")) == {}


def test_half_of_what_a_link_is_longer_than_the_clients_way_counts() -> None:
    far = server("a", links=(MeasuredLink("b", 0.1, 1.0),))
    assert found([], far, server("b"))["a", "b"] == pytest.approx((0.1 - WAY_S) / 2)


def test_a_server_that_says_it_is_near_gains_nothing() -> None:
    near = server("a", links=(MeasuredLink("b", 0.0, 1.0),))
    assert found([], near, server("b"))["a", "b"] == 0.0


@pytest.mark.parametrize("link", [MeasuredLink("b", 0.1, 3600.0), MeasuredLink("stranger", 0.1, 1.0)])
def test_old_words_and_words_about_unknown_servers_do_not_count(link: MeasuredLink) -> None:
    assert found([], server("a", links=(link,)), server("b")) == {}


def test_of_two_ways_to_one_server_the_longer_one_is_a_detour() -> None:
    steps = [step(("a", 1.0, 9), ("end", 30.0, 0)), step(("b", 1.0, 9), ("end", 10.0, 0))]
    assert found(steps) == {("a", "end"): pytest.approx(0.02), ("b", "end"): 0.0}


def test_what_the_client_has_seen_counts_and_not_what_a_server_says() -> None:
    steps = [step(("a", 1.0, 9), ("b", 10.0, 0))]
    assert found(steps, server("a", links=(MeasuredLink("b", 9.0, 1.0),)), server("b"))["a", "b"] == 0.0


def test_ways_through_the_client_and_long_steps_tell_nothing() -> None:
    through = step(("a", 1.0, 9), ("b", 10.0, 9))
    assert found([through, step(("a", 1.0, 9), ("b", 10.0, 0), tokens=8)]) == {}
