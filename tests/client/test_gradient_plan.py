"""How a batch is cut, and who gets what: decisions over plain numbers."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from swarmkit.client.gradients.flows import BackwardFlow, PassRequest, Side, Span
from swarmkit.client.gradients.plan import LEAST_TOKENS, MOST_TOKENS, Paces, finish_cost, micro_batches
from swarmkit.client.routing.route import Cost, find_route

from ..net.announcements import announcement

SHAPES = list(itertools.product([1, 2, 7, 8, 64], [1, 16, 128, 3000], [1, 2, 8]))


@pytest.mark.parametrize(("rows", "tokens", "servers"), SHAPES)
def test_every_row_is_in_one_micro_batch(rows: int, tokens: int, servers: int) -> None:
    parts = micro_batches(rows, tokens, servers)
    assert [row for low, high in parts for row in range(low, high)] == list(range(rows))


@pytest.mark.parametrize(("rows", "tokens", "servers"), SHAPES)
def test_micro_batches_are_neither_tiny_nor_huge(rows: int, tokens: int, servers: int) -> None:
    sizes = [(high - low) * tokens for low, high in micro_batches(rows, tokens, servers)]
    assert len(sizes) == 1 or min(sizes) >= LEAST_TOKENS // 2
    assert max(sizes) <= max(MOST_TOKENS, tokens)


def test_a_chain_of_two_has_enough_to_keep_both_busy() -> None:
    assert len(micro_batches(8, 128, 2)) == 8
    assert len(micro_batches(64, 16, 2)) == 8


def given_out(paces: dict[str, float], count: int) -> Counter[str]:
    """Who gets how many of so many equal micro-batches, all servers being free."""
    servers = [announcement(number) for number in range(len(paces))]
    by_peer = {server.peer_id: paces[name] for server, name in zip(servers, paces, strict=True)}
    backlog = dict.fromkeys(by_peer, 0.0)
    taken: Counter[str] = Counter()
    for _ in range(count):
        hop = find_route(2, 4, servers, cost_of(by_peer, backlog))[0]
        backlog[hop.server.peer_id] += 100 * (hop.stop - hop.start) * by_peer[hop.server.peer_id]
        taken[hop.server.peer_id] += 1
    return Counter({name: taken[server.peer_id] for server, name in zip(servers, paces, strict=True)})


def cost_of(paces: dict[str, float], backlog: dict[str, float], banned: str = "") -> Cost:
    return finish_cost(
        tokens=100,
        pace_s=paces.__getitem__,
        backlog_s=backlog.__getitem__,
        round_trip_s=lambda peer: 0.0,
        penalty_s=lambda peer: 1e6 if peer == banned else 0.0,
    )


def test_replicas_share_in_proportion_to_their_pace() -> None:
    assert given_out({"fast": 1.0, "slow": 3.0}, 40) == Counter({"fast": 30, "slow": 10})


def test_equal_replicas_share_alike() -> None:
    assert set(given_out({"one": 1.0, "other": 1.0, "third": 1.0}, 30).values()) == {10}


def test_who_is_left_aside_gets_nothing_while_there_is_another() -> None:
    one, other = (announcement(number) for number in range(2))
    paces = {one.peer_id: 1.0, other.peer_id: 100.0}
    cost = cost_of(paces, dict.fromkeys(paces, 0.0), banned=one.peer_id)
    assert find_route(2, 4, [one, other], cost)[0].server is other


def test_what_a_server_claims_counts_until_it_is_measured() -> None:
    paces = Paces()
    assert paces.of({"a": 1.0, "b": 2.0}) == {"a": 1.0, "b": 2.0}
    paces.observe("a", 10, 1.0)
    assert paces.of({"a": 1.0, "b": 2.0}) == pytest.approx({"a": 0.1, "b": 0.2})


def test_a_pace_follows_what_is_measured() -> None:
    paces = Paces()
    for _ in range(8):
        paces.observe("a", 10, 1.0)
    for _ in range(8):
        paces.observe("a", 10, 4.0)
    assert paces.of({"a": 1.0})["a"] == pytest.approx(0.4, rel=0.02)


# the way back


def tensor(value: float) -> torch.Tensor:
    return torch.full((1, 1, 2), value)


def test_a_part_whose_server_is_gone_can_be_done_by_two_others() -> None:
    flow = BackwardFlow(0, 0, [Span(0, 2, tensor(0)), Span(2, 5, tensor(2))], tensor(9), Side(), False)
    first = flow.question(2, 4)
    assert (first.direction, first.span.start, first.span.stop) == ("forward", 2, 4)
    flow.take(first, tensor(4), None, "peer")
    asked: list[PassRequest] = []
    while flow.wanted is not None:
        question = flow.question(*flow.wanted)
        asked.append(question)
        flow.take(question, tensor(question.span.start + 10), None, "peer")
    assert [(q.direction, q.span.start, q.span.stop, q.span.given[0, 0, 0].item()) for q in asked] == [
        ("backward", 4, 5, 4),
        ("backward", 2, 4, 2),
        ("backward", 0, 2, 0),
    ]
    assert [q.gradient[0, 0, 0].item() for q in asked if q.gradient is not None] == [9, 14, 12]
    assert torch.equal(flow.result, tensor(10))
