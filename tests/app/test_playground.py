"""What is behind the playground's page: conversations, answers that stop, and who may open it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.drawing.pipeline import slowest_part
from swarmkit.drawing.values import HopPicture
from swarmkit.errors import UsageError

from ..waiting import eventually

pytest.importorskip("gradio")

from swarmkit_app.playground import Playground
from swarmkit_app.playground.answers import AnswerProgress, AnswerRun
from swarmkit_app.playground.conversation import (
    ChatOptions,
    edited,
    plain,
    prompt_of,
    text_of,
    until_user,
)
from swarmkit_app.playground.page import Visitors

from swarmkit.api.engine import AnswerEngine
from swarmkit.api.refusals import ApiError

ASKED = {"role": "user", "content": "What is 7 + 5?"}
REPLY = {"role": "assistant", "content": "7 + 5 is 12."}
LONG = {"role": "user", "content": "Tell me a story about a fox."}


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    torch.set_num_threads(1)
    with LocalSwarm("tiny-chat", num_stages=2, transport="memory") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def engine(swarm: LocalSwarm) -> Iterator[AnswerEngine]:
    engine = AnswerEngine(swarm.model())
    yield engine
    engine.close()


async def all_of(run: AnswerRun) -> list[AnswerProgress]:
    return [progress async for progress in run.progress()]


def test_a_message_of_parts_is_one_text() -> None:
    assert text_of({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}) == "ab"


def test_to_regenerate_goes_back_to_the_last_question() -> None:
    assert until_user([ASKED, REPLY], 2) == [ASKED]


def test_nothing_is_regenerated_before_the_first_question() -> None:
    assert until_user([], 5) == []


def test_an_edit_drops_what_followed() -> None:
    assert edited([ASKED, REPLY, LONG], 0, "What is 1 + 1?") == [
        {"role": "user", "content": "What is 1 + 1?"}
    ]


def test_the_system_prompt_comes_first() -> None:
    assert prompt_of([ASKED], ChatOptions(system="Be brief."))[0] == {
        "role": "system",
        "content": "Be brief.",
    }


def test_an_empty_system_prompt_is_none() -> None:
    assert prompt_of([ASKED], ChatOptions(system="  ")) == plain([ASKED])


async def test_an_answer_grows_and_tells_its_speed_and_route(engine: AnswerEngine) -> None:
    last = (await all_of(AnswerRun(engine, [ASKED], ChatOptions())))[-1]
    assert "12" in last.text
    assert "tokens/s; the first after" in last.summary
    assert "server-0" in last.drawing


async def test_an_answer_that_is_stopped_keeps_its_text(engine: AnswerEngine) -> None:
    run = AnswerRun(engine, [LONG], ChatOptions())
    seen: list[AnswerProgress] = []
    async for progress in run.progress():
        seen.append(progress)
        if progress.text:
            run.stop()
    assert seen[-1].text
    assert "The answer was stopped." in seen[-1].summary


async def test_fifty_answers_that_are_left_free_their_sessions(
    engine: AnswerEngine, swarm: LocalSwarm
) -> None:
    for _ in range(50):
        async with aclosing(AnswerRun(engine, [LONG], ChatOptions()).progress()) as progress:
            async for shown in progress:
                if shown.text:
                    break
    last = (await all_of(AnswerRun(engine, [ASKED], ChatOptions())))[-1]
    assert "12" in last.text
    held = [server.serving.sessions for server in swarm.servers]  # type: ignore[attr-defined]
    await eventually(lambda: not any(service.sessions for service in held), "no session is open")


async def test_a_cut_answer_says_so(engine: AnswerEngine) -> None:
    last = (await all_of(AnswerRun(engine, [LONG], ChatOptions(max_tokens=3))))[-1]
    assert "3 tokens" in last.summary
    assert "cut at the longest length" in last.summary


async def test_a_prompt_that_is_too_long_is_refused(engine: AnswerEngine) -> None:
    too_long = {"role": "user", "content": "word " * 20_000}
    with pytest.raises(ApiError, match="takes 2048 at most"):
        await all_of(AnswerRun(engine, [too_long], ChatOptions()))


async def test_a_visitors_new_answer_ends_the_old_one(engine: AnswerEngine) -> None:
    visitors = Visitors()
    old, new = AnswerRun(engine, [LONG], ChatOptions()), AnswerRun(engine, [ASKED], ChatOptions())
    visitors.begin("visitor", old)
    visitors.begin("visitor", new)
    assert "stopped" in (await all_of(old))[-1].summary
    visitors.end("visitor", old)
    assert visitors.running == {"visitor": new}


async def test_a_visitors_stop_touches_no_other(engine: AnswerEngine) -> None:
    visitors = Visitors()
    visitors.begin("one", AnswerRun(engine, [LONG], ChatOptions()))
    visitors.begin("other", other := AnswerRun(engine, [ASKED], ChatOptions()))
    visitors.stop("one")
    assert "12" in (await all_of(other))[-1].text


def test_the_slowest_part_is_told_in_words() -> None:
    hops = [HopPicture("a", "cedar", 0, 4, 0.0, 6.0, 1.0), HopPicture("b", "birch", 4, 8, 0.0, 2.0, 1.0)]
    assert slowest_part(hops) == "Most of a token's time: computing at cedar (60% of 10 ms)."


def test_without_a_step_nothing_is_slow() -> None:
    assert slowest_part([]) == ""


def test_a_page_for_everybody_needs_a_password(swarm: LocalSwarm) -> None:
    with pytest.raises(UsageError, match="give it a password"):
        Playground([swarm.model()], host="0.0.0.0")


def test_a_page_with_a_password_shows_nothing_without_it(swarm: LocalSwarm) -> None:
    with (
        Playground([swarm.model()], password="open sesame") as playground,
        pytest.raises(urllib.error.HTTPError, match="401"),
    ):
        urllib.request.urlopen(f"{playground.url}config", timeout=20)


def test_the_page_names_no_other_place() -> None:
    """No font comes from elsewhere; what a browser asks of whom is checked in tests/browser."""
    from swarmkit_app.playground.page import theme

    assert theme()._stylesheets == []


@pytest.mark.timeout(180)
def test_the_command_serves_the_page_until_ctrl_c() -> None:
    command = [sys.executable, "-m", "swarmkit.cli", "playground", "--json", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        url = next(json.loads(line)["url"] for line in process.stdout if line.startswith("{"))
        assert urllib.request.urlopen(url, timeout=30).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
