"""What a client is told of its route, and whether that is what then happens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.client.route_report import RouteReport, explain_route
from swarmkit.events import StepFinished
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net.emulation.link_schedule import EmulatedLink
from swarmkit.settings import ServerSettings

from .answers import answer, prompt

DELAY_S = 0.15
"""One way; computing and the event loops take a few milliseconds, on a busy machine too."""
PROMPT_TOKENS, NEW_TOKENS = 32, 12
WITHIN = 0.25


@pytest.fixture
def near(tiny_llama: Checkpoint) -> Iterator[LocalSwarm]:
    with LocalSwarm(tiny_llama, 2, transport="memory") as swarm:
        yield swarm


def test_a_report_names_the_servers_in_order(near: LocalSwarm) -> None:
    report = explain_route(near.model(), alone=False)
    assert [(hop.facts.label, hop.facts.start, hop.facts.stop) for hop in report.hops] == [
        ("server-0", 0, 2),
        ("server-1", 2, 5),
    ]
    assert all(hop.facts.measured for hop in report.hops)


def test_a_report_says_who_would_be_used_instead(near: LocalSwarm) -> None:
    near.add_server((0, 2), settings=ServerSettings().replace(throughput=1.0))
    first, second = explain_route(near.model(), alone=False).hops
    assert (first.others, first.runner_up) == (1, ("server-2 [0:2]",))
    assert first.runner_up_costs_s > 0
    assert (second.others, second.runner_up) == (0, ())


def test_a_server_that_does_not_answer_is_reported_as_it_announces_itself(near: LocalSwarm) -> None:
    model = near.model()
    near.servers[0].kill()
    first, second = explain_route(model, alone=False).hops
    assert (first.facts.measured, second.facts.measured) == (False, True)


def test_running_alone_is_compared(near: LocalSwarm) -> None:
    report = explain_route(near.model())
    assert report.local_token_s is not None
    assert report.is_faster_alone == (report.local_token_s < report.forecast.token_s)


@pytest.mark.slow
def test_a_model_over_a_far_swarm_would_be_faster_alone(tiny_llama: Checkpoint) -> None:
    with LocalSwarm(tiny_llama, 1, link=EmulatedLink(delay_s=DELAY_S)) as swarm:
        assert explain_route(swarm.model()).is_faster_alone


# what then happens


def forecast_and_truth(swarm: LocalSwarm) -> tuple[RouteReport, float, float]:
    """The report, and then the seconds of a token and of the first one."""
    report = explain_route(swarm.model(), PROMPT_TOKENS, alone=False)
    client: SwarmModelForCausalLM = swarm.model()
    steps = client.subscribe(1024, StepFinished)
    answer(client, prompt(PROMPT_TOKENS)[0], new_tokens=NEW_TOKENS, speculation="off")
    first, *others = [event for event in steps.pending() if isinstance(event, StepFinished)]
    return report, statistics.median(step.total_ms for step in others) / 1e3, first.total_ms / 1e3


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_tokens_take_as_long_as_was_forecast(tiny_llama: Checkpoint, stages: int) -> None:
    with LocalSwarm(tiny_llama, stages, link=EmulatedLink(delay_s=DELAY_S)) as swarm:
        report, token_s, first_s = forecast_and_truth(swarm)
    assert report.forecast.token_s == pytest.approx(token_s, rel=WITHIN)
    assert report.forecast.first_token_s == pytest.approx(first_s, rel=WITHIN)


@pytest.mark.slow
def test_tokens_through_the_client_take_as_long_as_was_forecast(tiny_llama: Checkpoint) -> None:
    settings = ServerSettings().replace(push=False)
    link = EmulatedLink(delay_s=DELAY_S)
    with LocalSwarm(tiny_llama, 2, link=link, server_settings=settings) as swarm:
        model = swarm.model()
        model.connection.client.settings = model.connection.client.settings.replace(push=False)
        report = explain_route(model, PROMPT_TOKENS, alone=False)
        answer(model, prompt(PROMPT_TOKENS)[0], new_tokens=NEW_TOKENS, speculation="off")
        steps = [step.total_ms for step in model.trace if step.tokens == 1]
    assert report.forecast.token_s == pytest.approx(statistics.median(steps) / 1e3, rel=WITHIN)
