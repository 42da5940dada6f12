"""Whole simulations: the same seed, the same history; and what is found is what was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from swarmkit.errors import UsageError
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.plots import cumulative, draw_curves
from swarmkit.simulation.run import SimulationSetup, parse_mix, simulate, summary

SETUP = SimulationSetup(
    servers=24,
    requests=6,
    hours=0.1,
    churn_per_hour=6.0,
    rate=0.05,
    answer_tokens=16,
    assumptions=SwarmAssumptions(batching=True, paged=True, notice_s=10.0),
    seed=3,
)


def test_the_same_seed_gives_the_same_history() -> None:
    first, second = simulate(SETUP), simulate(SETUP)
    assert summary(SETUP, first) == summary(SETUP, second)
    assert first.samples == second.samples


def test_servers_that_come_and_go_lose_no_session_while_every_block_has_a_server() -> None:
    found = summary(SETUP, simulate(replace(SETUP, seed=4)))
    assert found["answers"] == 6
    assert found["lost_while_covered"] == 0


def test_a_swarm_carries_nearly_what_no_placement_can_exceed() -> None:
    setup = replace(SETUP, requests=0, churn_per_hour=0.0, servers=100)
    assert summary(setup, simulate(setup))["rate_to_bound"] >= 0.9


def test_a_trace_says_how_many_machines_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("0,0\n100,0\n100,9\n400,9\n400,7\n")
    setup = replace(SETUP, model="llama-2-7b", mix={"t4": 1.0}, trace=trace, requests=0, hours=0.2)
    assert simulate(setup).samples[-1].servers == 7


def test_a_mix_is_read_as_people_write_it() -> None:
    assert parse_mix("a100=1, t4=3") == {"a100": 1.0, "t4": 3.0}


@pytest.mark.parametrize("text", ["a100=x", "abacus=1"])
def test_another_mix_is_a_mistake(text: str) -> None:
    with pytest.raises(UsageError):
        parse_mix(text)


def test_too_few_servers_are_a_mistake() -> None:
    with pytest.raises(UsageError, match="blocks have no server"):
        simulate(replace(SETUP, servers=2))


def test_curves_become_a_picture() -> None:
    picture = draw_curves("Title", "x", "y", {"one": [(0.0, 0.0), (1.0, 2.0)], "<two>": [(0.0, 1.0)]})
    assert picture.count("<polyline") == 2
    assert "&lt;two&gt;" in picture


def test_a_cumulative_curve_ends_at_one() -> None:
    assert cumulative([3.0, 1.0]) == [(1.0, 0.5), (3.0, 1.0)]
