"""Dozens of virtual servers that move at the same moment, while announcements take their time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio
import pytest

from swarmkit.placement.description import Demand, Machine, ModelSize, Served
from swarmkit.simulation.distances import clusters
from swarmkit.simulation.hardware import SimulatedModel
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.rules import OurRule
from swarmkit.simulation.swarm import SimulatedSwarm, SwarmHistory
from swarmkit.simulation.virtual_time import VirtualClock, run_virtually

BLOCKS, HELD = 12, 4
MODEL = SimulatedModel(
    name="small",
    size=ModelSize(num_blocks=BLOCKS, block_bytes=1000, token_bytes=1.0),
    block_gflop=1.0,
    hidden_bytes=0,
)
SPREAD_S = 2.0


class RestlessRule:
    """Every server means to go on to the next blocks whenever it looks, wherever the others are."""

    def choose(self, machine: Machine, others: Sequence[Served]) -> tuple[int, int]:
        start = HELD * (int(machine.name) % (BLOCKS // HELD))
        return start, start + HELD

    def better(
        self, machine: Machine, own: Served, others: Sequence[Served], move_s: float
    ) -> tuple[int, int] | None:
        start = (own.start + HELD) % BLOCKS
        return start, start + HELD


def restless(seed: int, *, notice_s: float, servers: int = 9) -> SwarmHistory:
    """Three minutes of servers that look every few seconds, and load blocks in two."""
    assumptions = SwarmAssumptions(
        spread_s=SPREAD_S, move_notice_s=notice_s, look_period_s=4.0, load_bytes_per_s=HELD * 1000 / 2.0
    )

    async def main(clock: VirtualClock) -> SwarmHistory:
        async with anyio.create_task_group() as tasks:
            distances = clusters([servers], inside_rtt_s=0.02)
            swarm = SimulatedSwarm(MODEL, distances, RestlessRule(), assumptions, clock, tasks, seed=seed)
            for number in range(servers):
                name = f"{number:02}"
                swarm.join(Machine(name=name, memory_bytes=5000, decode_s=0.1, token_s=0.01), number)
            await anyio.sleep(180.0)
            history = swarm.finish()
            tasks.cancel_scope.cancel()
        return history

    return run_virtually(main)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))])
def test_servers_that_move_at_the_same_moment_leave_no_block_without_a_server(seed: int) -> None:
    history = restless(seed, notice_s=SPREAD_S)
    assert history.gaps == []
    assert history.moves > 9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_dozens_of_servers_leave_no_block_without_a_server(seed: int) -> None:
    history = restless(seed, notice_s=SPREAD_S, servers=40)
    assert history.gaps == []
    assert history.moves > 40


RARE = Demand(arrivals_per_s=0.001, prompt_tokens=10, answer_tokens=10)


def is_covered_after(
    rule: OurRule,
    names: Sequence[str],
    memory_bytes: int,
    assumptions: SwarmAssumptions,
    seed: int,
    lives: Callable[[SimulatedSwarm], Awaitable[None]],
) -> bool:
    """Whether a swarm whose servers join at once has all blocks after what it lives through."""

    async def main(clock: VirtualClock) -> bool:
        async with anyio.create_task_group() as tasks:
            distances = clusters([len(names)], inside_rtt_s=0.02)
            swarm = SimulatedSwarm(MODEL, distances, rule, assumptions, clock, tasks, seed=seed)
            for number, name in enumerate(names):
                machine = Machine(name=name, memory_bytes=memory_bytes, decode_s=0.1, token_s=0.01)
                swarm.join(machine, number)
            await lives(swarm)
            is_covered = swarm.is_covered()
            tasks.cancel_scope.cancel()
        return is_covered

    return run_virtually(main)


class ApartRule(OurRule):
    """Our own rule, of two servers that begin with the blocks 0:4 and 5:9 of twelve, and could hold eight."""

    def choose(self, machine: Machine, others: Sequence[Served]) -> tuple[int, int]:
        start = 5 * int(machine.name)
        return start, start + HELD


@pytest.mark.parametrize("seed", range(5))
def test_servers_of_which_each_is_the_only_one_of_some_block_fill_gaps(seed: int) -> None:
    assumptions = SwarmAssumptions(look_period_s=4.0, load_bytes_per_s=HELD * 1000 / 2.0)

    async def a_minute(_: SimulatedSwarm) -> None:
        await anyio.sleep(60.0)

    assert is_covered_after(ApartRule(MODEL.size, RARE), ["0", "1"], 8500, assumptions, seed, a_minute)


class RememberedPlaces(OurRule):
    """Our own rule, of eleven servers that begin where they were before most of them crashed."""

    def choose(self, machine: Machine, others: Sequence[Served]) -> tuple[int, int]:
        return {"00": (0, 3), "01": (5, 11), "02": (0, 6), "03": (1, 4)}.get(machine.name, (4, 12))


@pytest.mark.parametrize("seed", range(5))
def test_two_servers_that_are_left_of_eleven_fill_the_gap_long_before_the_announcements_of_the_others_end(
    seed: int,
) -> None:
    """They look every three seconds, learn in two who is gone, wait for two and load for another two."""
    assumptions = SwarmAssumptions(look_period_s=3.0, record_lifetime_s=300.0, load_bytes_per_s=6000.0)
    names = [f"{number:02}" for number in range(11)]

    async def nine_crash(swarm: SimulatedSwarm) -> None:
        await anyio.sleep(4.0)
        for name in names[2:]:
            swarm.leave(name)
        await anyio.sleep(20.0)

    rule = RememberedPlaces(MODEL.size, RARE)
    assert is_covered_after(rule, names, 11_500, assumptions, seed, nine_crash)


def test_servers_that_go_before_others_can_know_leave_blocks_without_a_server() -> None:
    assert restless(0, notice_s=0.0).gaps != []


@pytest.mark.slow
def test_of_two_servers_for_each_block_one_always_stays() -> None:
    for seed in range(20):
        history = restless(seed, notice_s=SPREAD_S, servers=6)
        assert history.gaps == []
        assert history.moves > 3
