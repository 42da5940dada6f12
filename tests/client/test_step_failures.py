"""Who is to blame when servers refuse a step as malformed, and who is asked next."""

from __future__ import annotations

import pytest

from swarmkit.client.routing.bans import PENALTY_S
from swarmkit.client.routing.step_failures import StepFailures
from swarmkit.net.registry.records import Announcement

from ..net.announcements import announcement

SERVERS = {"a": (0, 6), "b": (0, 6), "c": (0, 3), "d": (3, 6)}


def server(name: str) -> Announcement:
    start, stop = SERVERS[name]
    return announcement(peer_id=name, start=start, stop=stop)


def refused_by(*names: str) -> StepFailures:
    failures = StepFailures()
    for name in names:
        failures.note(name, refused=True)
    return failures


@pytest.mark.parametrize(
    ("refusers", "servers", "worked", "blamed"),
    [
        ("a", "a", "", True),  # the only server there is
        ("a", "ab", "", False),
        ("ab", "ab", "", True),  # all of them
        ("a", "acd", "", False),
        ("acd", "acd", "", True),
        ("ac", "acd", "", True),  # blocks 0:3 have no other server
        ("a", "ab", "a", False),  # one alone may begin to lie after it has worked
        ("ba", "abcd", "a", True),  # a second voice, and one that has worked
        ("ab", "abcd", "a", False),  # the second voice is unknown
    ],
)
def test_the_step_is_to_blame_where_all_say_so_or_a_second_one_that_has_worked(
    refusers: str, servers: str, worked: str, blamed: bool
) -> None:
    failures = refused_by(*refusers)
    assert failures.is_step_to_blame(0, 6, [server(name) for name in servers], set(worked)) is blamed


def test_servers_that_failed_otherwise_do_not_agree() -> None:
    failures = refused_by("a")
    failures.note("b", refused=False)
    assert not failures.is_step_to_blame(0, 6, [server("a"), server("b")], set())


def test_fifty_strangers_alone_do_not_put_the_blame_on_the_step() -> None:
    strangers = [announcement(peer_id=f"stranger-{number}", start=0, stop=6) for number in range(50)]
    failures = refused_by(*(stranger.peer_id for stranger in strangers))
    assert not failures.is_step_to_blame(0, 6, [*strangers, server("a")], set())


def test_a_server_that_has_not_failed_costs_nothing() -> None:
    assert refused_by("a").penalty_s("b") == 0.0


def test_a_server_that_failed_in_the_step_costs_more_than_one_that_is_banned() -> None:
    failures = StepFailures()
    failures.note("a", refused=False)
    assert failures.penalty_s("a") > 30 * PENALTY_S


def test_a_server_that_refused_the_step_is_asked_after_those_that_failed_otherwise() -> None:
    failures = refused_by("a")
    failures.note("b", refused=False)
    assert failures.penalty_s("a") > failures.penalty_s("b")


def test_a_server_that_failed_more_often_in_the_step_is_asked_later() -> None:
    failures = StepFailures()
    for name in "aab":
        failures.note(name, refused=False)
    assert failures.penalty_s("a") > failures.penalty_s("b")
