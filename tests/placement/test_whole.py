"""Placing all servers at once."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from swarmkit.errors import UsageError
from swarmkit.placement.chains import MachineSpan, ServerChain, compose_chains, expected_answer_s
from swarmkit.placement.description import Demand, Machine, ModelSize, Served, blocks_that_fit
from swarmkit.placement.supply import greatest_rate
from swarmkit.placement.whole import plan_placement

MODEL = ModelSize(num_blocks=4, block_bytes=10, token_bytes=1)


def machine(name: str, memory_bytes: float, token_s: float = 0.01, **changes: float) -> Machine:
    return Machine(name=name, memory_bytes=memory_bytes, decode_s=token_s, token_s=token_s, **changes)


# as many tokens per second as possible


def best_of_all(machines: Sequence[Machine], size: ModelSize) -> float:
    """The greatest rate of any placement: every one is tried."""
    counts = [blocks_that_fit(one, size) for one in machines]
    placements = itertools.product(*(range(size.num_blocks - count + 1) for count in counts))
    return max(
        greatest_rate(
            size.num_blocks,
            [
                Served(start, start + count, one.rate(count))
                for start, count, one in zip(starts, counts, machines, strict=True)
            ],
        )
        for starts in placements
    )


@pytest.mark.parametrize("number", range(8))
def test_no_placement_of_few_servers_carries_much_more(number: int) -> None:
    """With equal memories none carries more at all; see `benchmarks/placement.py` for larger ones."""
    chance = random.Random(number)
    size = ModelSize(num_blocks=6, block_bytes=1, token_bytes=0)
    same = chance.randint(2, 5)
    machines = [
        machine(str(n), same if number % 2 else chance.randint(2, 5), chance.uniform(0.01, 0.08))
        for n in range(4)
    ]
    found, best = plan_placement(machines, size, effort=500).rate, best_of_all(machines, size)
    assert found >= best * (1 - 1e-9 if number % 2 else 0.95)


def test_machines_that_cannot_hold_the_model_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot hold 4 blocks"):
        plan_placement([machine("a", 19)], MODEL, Demand(prompt_tokens=0, answer_tokens=1))


# answers as soon as possible


def test_the_more_requests_come_the_more_cache_is_reserved() -> None:
    """One server has all blocks while requests are few; chains of two leave room for many."""
    machines = [machine(str(n), 60, way_s=0.01) for n in range(4)]
    reserved = [
        plan_placement(
            machines, MODEL, Demand(arrivals_per_s=rate, prompt_tokens=1, answer_tokens=4)
        ).reserved
        for rate in (0.01, 20.0)
    ]
    assert reserved[0] < reserved[1]


def test_a_chain_carries_as_many_sessions_as_its_fullest_cache() -> None:
    placed = [MachineSpan(machine("a", 100), 0, 2), MachineSpan(machine("b", 40), 2, 4)]
    (chain,) = compose_chains(placed, MODEL, Demand(prompt_tokens=1, answer_tokens=4))
    assert chain.sessions == 2  # of b: 20 bytes are left, a session takes 5 in each of two blocks
    assert chain.parts == ((0, 0, 2), (1, 2, 4))


def test_what_the_fastest_chain_leaves_becomes_other_chains() -> None:
    placed = [
        MachineSpan(machine("first", 200), 0, 2),
        MachineSpan(machine("fast", 40), 2, 4),
        MachineSpan(machine("slow", 40, 0.1), 2, 4),
    ]
    chains = compose_chains(placed, MODEL, Demand(prompt_tokens=1, answer_tokens=4))
    assert [[part[0] for part in chain.parts] for chain in chains] == [[0, 1], [0, 2]]
    assert chains[0].answer_s < chains[1].answer_s


def erlang_wait_s(servers: int, arrivals: float, each_s: float) -> float:
    """Mean wait in a queue with so many equal places (Erlang's formula C)."""
    offered = arrivals * each_s
    terms = [offered**n / math.factorial(n) for n in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last) * each_s / (servers - offered)


@pytest.mark.parametrize("arrivals", [0.5, 1.5, 2.9])
def test_waiting_at_equal_chains_is_that_of_erlang(arrivals: float) -> None:
    chain = ServerChain(parts=(), answer_s=1.0, sessions=3)
    wanted = 1.0 + erlang_wait_s(3, arrivals, 1.0)
    assert expected_answer_s([chain], arrivals) == pytest.approx(wanted)


def test_more_requests_than_can_be_answered_wait_for_ever() -> None:
    assert expected_answer_s([ServerChain((), 1.0, 3)], 3.0) == math.inf
