"""What a soak calls left, and what it does not."""

from __future__ import annotations

import msgspec
import pytest

from swarmkit.bench.soak import most, what_is_left
from swarmkit.net.protocol.messages import Resources

QUIET = Resources(
    sessions=0,
    streams=1,
    pushers=0,
    leased_bytes=0,
    kept_bytes=64,
    capacity_bytes=128,
    receive_budget_bytes=0,
    works=0,
    accounted=True,
    tasks=9,
    threads=4,
    descriptors=20,
)


def changed(**fields: object) -> Resources:
    return msgspec.structs.replace(QUIET, **fields)


def test_a_server_as_it_was_has_nothing_left() -> None:
    assert what_is_left("one", QUIET, changed(kept_bytes=128, tasks=8)) == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"sessions": 2}, "one: 2 sessions"),
        ({"leased_bytes": 64}, "one: 64 leased_bytes"),
        ({"works": 1}, "one: 1 works"),
        ({"tasks": 10}, "one: 10 tasks, before 9"),
        ({"descriptors": 21}, "one: 21 descriptors, before 20"),
        ({"accounted": False}, "one: the bytes of its cache do not add up"),
        ({"kept_bytes": 129}, "one: the bytes of its cache do not add up"),
    ],
)
def test_what_is_still_there_is_named(fields: dict[str, object], line: str) -> None:
    assert what_is_left("one", QUIET, changed(**fields)) == [line]


def test_a_server_that_does_not_answer_is_not_sound() -> None:
    assert what_is_left("one", QUIET, None) == ["one does not answer"]


def test_what_comes_and_goes_by_itself_is_compared_with_its_most() -> None:
    assert most([changed(tasks=12, threads=4), changed(tasks=9, threads=5)]) == changed(tasks=12, threads=5)
