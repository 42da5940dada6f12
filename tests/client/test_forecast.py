"""What to expect of a route."""

from __future__ import annotations

import pytest

from swarmkit.client.routing.forecast import HopFacts, forecast, link_s, one_more


def hop(
    name: str,
    start: int,
    stop: int,
    way_s: float = 0.1,
    compute_s: float = 0.01,
    *,
    queue_s: float = 0.0,
    prompt_token_s: float = 0.0,
    open_s: float = 0.0,
) -> HopFacts:
    return HopFacts(name, name, start, stop, way_s, compute_s, queue_s, prompt_token_s, open_s)


def test_over_one_server_a_token_takes_the_way_there_and_back_and_the_work() -> None:
    assert forecast([hop("a", 0, 4)], {}).token_s == pytest.approx(0.11)


def test_from_server_to_server_a_token_goes_one_way() -> None:
    found = forecast([hop("a", 0, 2), hop("b", 2, 4)], {("a", "b"): 0.02})
    assert found.token_s == pytest.approx(0.05 + 0.01 + 0.01 + 0.01 + 0.05)


def test_through_the_client_it_goes_there_and_back_each_time() -> None:
    found = forecast([hop("a", 0, 2), hop("b", 2, 4)], {("a", "b"): 0.02}, push=False)
    assert found.token_s == pytest.approx(0.22)


def test_the_client_waits_for_a_far_server_on_the_way() -> None:
    found = forecast([hop("far", 0, 2, 1.0), hop("b", 2, 4, 0.0)], {("far", "b"): 0.0})
    assert found.token_s >= 1.01


def test_an_unknown_way_is_the_middle_of_what_is_possible() -> None:
    assert link_s(hop("a", 0, 2, 0.3), hop("b", 2, 4, 0.1), {}) == pytest.approx(
        ((0.3 - 0.1) + (0.3 + 0.1)) / 2
    )


def test_the_first_token_takes_the_opening_and_the_prompt() -> None:
    one = hop("a", 0, 4, prompt_token_s=0.001, open_s=0.5)
    found = forecast([one], {}, prompt_tokens=200)
    assert found.first_token_s == pytest.approx(0.5 + 0.1 + 0.2)


def test_the_parts_of_a_token_are_the_whole() -> None:
    hops = [hop("a", 0, 2, queue_s=0.03), hop("b", 2, 4)]
    found = forecast(hops, {}, own_s=0.02)
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.token_s)


def test_the_bottleneck_is_what_takes_longest() -> None:
    hops = [hop("a", 0, 2), hop("slow", 2, 4, compute_s=0.4)]
    assert forecast(hops, {}).bottleneck.where == "slow"


def test_one_more_server_takes_the_place_of_the_slow_one() -> None:
    hops = [hop("a", 0, 2), hop("slow", 2, 4, compute_s=0.4)]
    more = one_more(hops, {}, 2, forecast(hops, {}))
    assert more is not None
    assert (more.start, more.stop) == (2, 4)
    assert more.forecast.token_s < 0.2


def test_one_more_server_that_holds_everything_saves_the_ways_between() -> None:
    hops = [hop(str(at), at, at + 1) for at in range(4)]
    more = one_more(hops, {}, 4, forecast(hops, {}))
    assert more is not None
    assert more.forecast.token_s == pytest.approx(0.1 + 4 * 0.01)


def test_one_more_server_like_the_only_one_brings_nothing() -> None:
    hops = [hop("a", 0, 4)]
    assert one_more(hops, {}, 4, forecast(hops, {})) is None
