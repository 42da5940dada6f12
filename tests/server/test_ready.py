"""A server that says it is ready has answered a token, and one that answers no more says it is not ready."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
import torch

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.models.execution.stage import Stage
from swarmkit.net.registry.records import MeasuredLink
from swarmkit.server.probe import ProbeError, probe
from swarmkit.server.serving import Serving
from swarmkit.server.sessions.link_times import LinkTimes
from swarmkit.server.vitals import Vitals
from swarmkit.settings import NodeSettings, ServerSettings

from ..waiting import eventually
from .test_node import LoneServer, Neighbourhood
from .worlds import World, hidden_states


@pytest.fixture
async def here(world: World) -> AsyncIterator[Neighbourhood]:
    here = Neighbourhood(world)
    yield here
    await here.close()


def serving_of(server: LoneServer) -> Serving:
    serving = server.server.serving
    assert serving is not None
    return serving


def vitals_of(
    server: LoneServer, compute_share: Callable[[], float] = lambda: 1.0, **settings: Any
) -> Vitals:
    serving = serving_of(server)
    node = NodeSettings(**{"throughput": None, **settings})
    return Vitals(
        serving,
        server.server.config.checkpoint.fingerprint,
        node,
        LinkTimes(SYSTEM_CLOCK.now),
        SYSTEM_CLOCK,
        compute_share=compute_share,
    )


class Broken:
    """Has all stages compute NaN while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = True
        works = Stage.forward_many

        def forward_many(stage: Stage, parts: Any) -> Any:
            outputs = works(stage, parts)
            return [torch.full_like(each, torch.nan) for each in outputs] if self.on else outputs  # type: ignore[arg-type]

        monkeypatch.setattr(Stage, "forward_many", forward_many)


async def test_a_server_that_computes_nonsense_never_says_that_it_is_ready(
    here: Neighbourhood, monkeypatch: pytest.MonkeyPatch
) -> None:
    Broken(monkeypatch)
    with pytest.raises(ProbeError, match="do not answer a token"):
        await here.node(num_blocks=2).run()
    assert [one.state for one in here.announced] == ["joining", "leaving"]


async def test_a_move_to_blocks_that_answer_nothing_leaves_the_old_ones_served(
    here: Neighbourhood, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await here.start(num_blocks=2)
    Broken(monkeypatch)
    with pytest.raises(ProbeError):
        await server.server.move((2, 4))
    assert [(one.start, one.state) for one in await here.seen()] == [(0, "online"), (2, "leaving")]


async def test_the_probe_is_no_step_of_a_client(here: Neighbourhood) -> None:
    server = await here.start(num_blocks=2)
    assert (serving_of(server).sessions.steps, serving_of(server).sessions.num_sessions) == (0, 0)


async def test_a_server_without_room_works_all_the_same(here: Neighbourhood) -> None:
    settings = ServerSettings().replace(max_sessions=1)
    server = await here.start(num_blocks=2, settings=settings)
    await here.session_with(server)
    await probe(serving_of(server), server.server.config.checkpoint.fingerprint, SYSTEM_CLOCK)


async def test_a_server_that_answers_no_more_is_withdrawn_until_it_does(
    here: Neighbourhood, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings().replace(measure_period_s=0.01, announce_period_s=0.01)
    await here.start(num_blocks=2, settings=settings)
    broken = Broken(monkeypatch)
    await eventually(lambda: here.announced[-1].state == "leaving", "the server withdraws itself")
    broken.on = False
    await eventually(lambda: here.announced[-1].state == "online", "the server is back")


# how fast it is


async def test_the_speed_of_its_clients_steps_is_what_it_announces(here: Neighbourhood) -> None:
    server = await here.start(num_blocks=2)
    vitals = vitals_of(server)
    client = await here.session_with(server)
    for position in range(4):
        await client.step(hidden_states(1, 1), position=position)
    single_s, _ = serving_of(server).engine.learned_of(serving_of(server).stage).times.measured()
    assert single_s is not None
    assert vitals.news()["throughput"] == pytest.approx(1 / single_s)


async def test_what_it_announces_has_an_age(here: Neighbourhood) -> None:
    vitals = vitals_of(await here.start(num_blocks=2))
    await vitals.measure()
    before = vitals.news()["measured_age_s"]
    await anyio.sleep(0.01)
    assert vitals.news()["measured_age_s"] >= before + 0.01


async def test_both_rates_are_measured(here: Neighbourhood) -> None:
    vitals = vitals_of(await here.start(num_blocks=2))
    await vitals.measure()
    news = vitals.news()
    assert 0 < news["throughput"] <= news["forward_rate"]


async def test_a_speed_that_the_owner_sets_is_announced_as_it_is(here: Neighbourhood) -> None:
    vitals = vitals_of(await here.start(num_blocks=2), throughput=12.5)
    await vitals.measure()
    assert vitals.news()["throughput"] == 12.5


async def test_a_device_that_rests_half_of_the_time_announces_half_the_speed(here: Neighbourhood) -> None:
    share = 1.0
    vitals = vitals_of(await here.start(num_blocks=2), lambda: share)
    await vitals.measure()
    whole = vitals.news()
    share = 0.5
    half = vitals.news()
    assert [half[name] for name in ("throughput", "forward_rate")] == [
        pytest.approx(whole[name] / 2) for name in ("throughput", "forward_rate")
    ]


async def test_the_share_that_is_left_reaches_the_announcement(here: Neighbourhood) -> None:
    settings = ServerSettings().replace(throughput=None, announce_period_s=0.01, measure_period_s=1000.0)
    server = await here.start(num_blocks=2, settings=settings)
    await eventually(lambda: here.announced[-1].throughput > 1.0, "its speed is announced")
    usual = here.announced[-1].throughput
    server.server.set_limits(server.server.limits.replace(compute_share=0.25))
    await eventually(
        lambda: here.announced[-1].throughput == pytest.approx(usual / 4), "a quarter is announced"
    )


async def test_another_number_of_threads_is_measured_at_once(here: Neighbourhood) -> None:
    settings = ServerSettings().replace(throughput=None, announce_period_s=0.01, measure_period_s=1000.0)
    server = await here.start(num_blocks=2, settings=settings)
    await eventually(lambda: here.announced[-1].measured_age_s > 0.05, "what it measured has some age")
    last = len(here.announced) - 1
    server.server.set_limits(server.server.limits.replace(threads=1))

    def was_measured_anew() -> bool:
        ages = [one.measured_age_s for one in here.announced[last:]]
        return any(later < earlier for earlier, later in itertools.pairwise(ages))

    await eventually(was_measured_anew, "it was measured anew")


async def test_the_links_that_were_used_are_announced(here: Neighbourhood) -> None:
    server = await here.start(num_blocks=2, settings=ServerSettings().replace(announce_period_s=0.01))
    server.server.ways.note("next", 0.5)
    await eventually(lambda: bool(here.announced[-1].links), "the link is announced")
    (link,) = here.announced[-1].links
    assert (link.service_id, link.round_trip_s) == (MeasuredLink("next", 0.5, 0.0).service_id, 0.5)
