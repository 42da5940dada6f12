"""Whether keys and values are brought, or computed again, follows from what is known of servers and links."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarmkit.client.routing.handover_choice import (
    ASSUMED_BYTES_PER_S,
    HandoverFacts,
    handover_s,
    is_handover_quicker,
    patience_s,
    replay_s,
)

FACTS = HandoverFacts(
    size=2000,
    kv_bytes=40_000,
    hidden_bytes=16_000,
    prompt_token_s=0.01,
    old_way_s=0.05,
    new_way_s=0.05,
    to_new=20e6,
    from_new=20e6,
    from_old=40e6,
)
"""A session of 2,000 tokens: 20 s to compute, 64 MB of hidden states, 80 MB of keys and values."""


def test_a_replay_sends_computes_and_returns() -> None:
    assert replay_s(FACTS) == pytest.approx(0.05 + 1.6 + 1.6 + 20.0)


def test_a_link_that_was_not_measured_is_as_slow_as_the_slower_of_those_that_were() -> None:
    assert handover_s(FACTS) == pytest.approx(0.4 + 80e6 / 20e6)


def test_a_link_that_was_measured_counts_as_it_is() -> None:
    assert handover_s(replace(FACTS, between=80e6)) == pytest.approx(0.4 + 1.0)


def test_where_no_link_was_measured_one_is_assumed() -> None:
    unknown = replace(FACTS, to_new=None, from_old=None)
    assert handover_s(unknown) == pytest.approx(0.4 + 80e6 / ASSUMED_BYTES_PER_S)


@pytest.mark.parametrize(
    ("changes", "is_quicker"),
    [
        ({}, True),
        ({"size": 10}, False),
        ({"prompt_token_s": 1e-5}, False),
        ({"between": 1e6}, False),
        ({"between": 1e6, "to_new": 0.5e6}, True),
        ({"kv_bytes": 0}, False),
    ],
    ids=["long", "short", "quick to compute", "a slow link between", "all slow", "not offered"],
)
def test_the_quicker_way_is_taken(changes: dict[str, float], is_quicker: bool) -> None:
    assert is_handover_quicker(replace(FACTS, **changes)) is is_quicker  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "seconds"), [(1, 10.0), (2000, 17.6), (2_000_000, 120.0)])
def test_patience_follows_the_expectation_within_bounds(size: int, seconds: float) -> None:
    assert patience_s(replace(FACTS, size=size)) == pytest.approx(seconds)
