"""What is behind the playground's page: conversations, answers that stop, and who may open it."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.drawing.pipeline import slowest_part
from swarmkit.drawing.values import HopPicture
from swarmkit.errors import UsageError

from ..cli.commands import start
from ..clocks import SetClock
from ..waiting import eventually, wait_until

pytest.importorskip("gradio")

from swarmkit_app.playground import Playground
from swarmkit_app.playground.answering import Answering
from swarmkit_app.playground.answers import AnswerProgress, AnswerRun
from swarmkit_app.playground.api_tab import as_curl, as_python
from swarmkit_app.playground.compare_tab import side_by_side
from swarmkit_app.playground.conversation import (
    ChatOptions,
    chat_request,
    completion_request,
    edited,
    plain,
    prompt_of,
    text_of,
    until_user,
)
from swarmkit_app.playground.style import theme
from swarmkit_app.playground.swarm_tab import swarm_html
from swarmkit_app.playground.visitors import Allowance, Visitors, counted_as
from swarmkit_app.playground.waiting_line import WaitingLine

from swarmkit.api.engine import AnswerEngine
from swarmkit.api.refusals import ApiError
from swarmkit.client.fresh_status import FreshStatus

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


def answer_to(engine: AnswerEngine, *history: Any, **options: Any) -> AnswerRun:
    return AnswerRun(engine, partial(chat_request, history=history, options=ChatOptions(**options)))


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
    last = (await all_of(answer_to(engine, ASKED)))[-1]
    assert "12" in last.text
    assert "tokens/s; the first after" in last.summary
    assert "server-0" in last.drawing


async def test_an_answer_that_is_stopped_keeps_its_text(engine: AnswerEngine) -> None:
    run = answer_to(engine, LONG)
    seen: list[AnswerProgress] = []
    async for progress in run.progress():
        seen.append(progress)
        if progress.text:
            run.stop()
    assert seen[-1].text
    assert "The answer was stopped." in seen[-1].summary


async def test_answers_that_are_left_free_their_sessions(engine: AnswerEngine, swarm: LocalSwarm) -> None:
    for _ in range(20):
        async with aclosing(answer_to(engine, LONG).progress()) as progress:
            async for shown in progress:
                if shown.text:
                    break
    last = (await all_of(answer_to(engine, ASKED)))[-1]
    assert "12" in last.text
    held = [server.serving.sessions for server in swarm.servers]  # type: ignore[attr-defined]
    await eventually(lambda: not any(service.sessions for service in held), "no session is open")


async def test_a_cut_answer_says_so(engine: AnswerEngine) -> None:
    last = (await all_of(answer_to(engine, LONG, max_tokens=3)))[-1]
    assert "3 tokens" in last.summary
    assert "cut at the longest length" in last.summary


async def test_a_prompt_that_is_too_long_is_refused(engine: AnswerEngine) -> None:
    too_long = {"role": "user", "content": "word " * 20_000}
    with pytest.raises(ApiError, match="takes 2048 at most"):
        await all_of(answer_to(engine, too_long))


async def test_an_answer_goes_on_where_it_was_cut(engine: AnswerEngine) -> None:
    whole = (await all_of(answer_to(engine, LONG)))[-1].text
    cut = (await all_of(answer_to(engine, LONG, max_tokens=12)))[-1].text
    rest = (await all_of(answer_to(engine, LONG, {"role": "assistant", "content": cut})))[-1].text
    assert cut + rest == whole


async def test_a_text_is_gone_on_with_and_each_token_has_its_probability(engine: AnswerEngine) -> None:
    options = ChatOptions(max_tokens=8)
    run = AnswerRun(engine, partial(completion_request, text="One morning", options=options))
    last = (await all_of(run))[-1]
    assert len(last.tokens) == 8
    assert "".join(token.chosen.text for token in last.tokens) == last.text


async def test_a_stop_string_ends_an_answer(engine: AnswerEngine) -> None:
    last = (await all_of(answer_to(engine, ASKED, stops=("12",))))[-1]
    assert last.text.endswith(" is ")


async def test_a_visitors_new_answer_takes_the_place_of_the_old_one(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(4, 4))
    old = ask(answering, "visitor", LONG, turn=1)
    await anext(old)
    new = asyncio.create_task(all_told(ask(answering, "visitor", ASKED, turn=2)))
    assert not [each async for each in old][-1].is_wanted
    assert "12" in (await new)[-1].text


async def test_an_answer_that_was_asked_for_earlier_takes_no_later_ones_place(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(4, 4))
    later = ask(answering, "visitor", ASKED, turn=2)
    await anext(later)
    assert [each.is_wanted for each in await all_told(ask(answering, "visitor", LONG, turn=1))] == [False]
    assert "12" in [each async for each in later][-1].text


async def test_a_stop_that_arrives_before_its_answer_begins_ends_it(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(4, 4))
    answering.visitors.stop("visitor", "chat", turn=1)
    assert [each.summary for each in await all_told(ask(answering, "visitor", LONG, turn=1))] == [
        "The answer was stopped."
    ]
    assert "12" in (await all_told(ask(answering, "visitor", ASKED, turn=2)))[-1].text


async def test_a_stop_that_arrives_late_touches_no_later_answer(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(4, 4))
    later = ask(answering, "visitor", ASKED, turn=2)
    await anext(later)
    answering.visitors.stop("visitor", "chat", turn=1)
    assert "12" in [each async for each in later][-1].text


async def test_nothing_is_shown_of_an_answer_whose_place_was_cleared(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(4, 4))
    told = ask(answering, "visitor", LONG, turn=1)
    await anext(told)
    cleared = asyncio.create_task(answering.visitors.clear("visitor", "chat", turn=1))
    assert not [each async for each in told][-1].is_wanted
    await cleared
    assert answering.line.running == 0


async def test_nothing_is_shown_of_an_answer_that_begins_after_its_place_was_cleared(
    engine: AnswerEngine,
) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(4, 4))
    await answering.visitors.clear("visitor", "chat", turn=1)
    assert [each.is_wanted for each in await all_told(ask(answering, "visitor", LONG, turn=1))] == [False]


async def test_answers_in_two_parts_of_a_page_run_beside_each_other(engine: AnswerEngine) -> None:
    visitors = Visitors()
    left, right = answer_to(engine, LONG), answer_to(engine, ASKED)
    await visitors.begin("visitor", "left", left, 1)
    await visitors.begin("visitor", "right", right, 1)
    visitors.stop("visitor", "left", 1)
    assert left.stopped.is_set()
    assert not right.stopped.is_set()


async def test_a_page_that_is_closed_ends_all_its_answers(engine: AnswerEngine) -> None:
    visitors = Visitors()
    left, right = answer_to(engine, LONG), answer_to(engine, ASKED)
    await visitors.begin("visitor", "left", left, 1)
    await visitors.begin("visitor", "right", right, 1)
    visitors.gone("visitor")
    assert left.stopped.is_set()
    assert right.stopped.is_set()


async def test_a_visitors_stop_touches_no_other(engine: AnswerEngine) -> None:
    visitors = Visitors()
    await visitors.begin("one", "chat", answer_to(engine, LONG), 1)
    await visitors.begin("other", "chat", other := answer_to(engine, ASKED), 1)
    visitors.stop("one", "chat", 1)
    assert "12" in (await all_of(other))[-1].text


async def test_two_answers_are_told_side_by_side() -> None:
    turns = [asyncio.Event(), asyncio.Event()]

    async def told(own: int) -> AsyncGenerator[str, None]:
        for number in range(2):
            await turns[own].wait()  # each waits for the other: one after the other would never end
            turns[own].clear()
            turns[1 - own].set()
            yield f"{own}{number}"

    turns[0].set()
    both = [each async for each in side_by_side([told(0), told(1)])]
    assert both == [["00", None], [None, "10"], ["01", None], [None, "11"]]


async def test_answers_side_by_side_end_with_their_reader() -> None:
    ended = []

    async def told(own: int) -> AsyncGenerator[int, None]:
        try:
            yield own
            await asyncio.Event().wait()
        finally:
            ended.append(own)

    async with aclosing(side_by_side([told(0), told(1)])) as both:
        await anext(both)
        await anext(both)
    assert sorted(ended) == [0, 1]


# the line and its limits


async def test_the_line_moves_on_when_somebody_leaves() -> None:
    line = WaitingLine(most_running=1, most_waiting=2)
    first, second, third = line.join(), line.join(), line.join()
    assert [each.look() for each in (first, second, third)] == [0, 1, 2]
    with second:
        pass  # whoever waits may leave, too
    assert third.moved.is_set()
    assert third.look() == 1
    first.__exit__()
    assert third.moved.is_set()
    assert third.look() == 0


async def test_without_room_to_wait_the_first_is_let_in() -> None:
    assert WaitingLine(most_running=1, most_waiting=0).join().look() == 0


async def test_a_line_that_is_full_refuses() -> None:
    line = WaitingLine(most_running=1, most_waiting=1)
    with line.join(), line.join(), pytest.raises(ApiError, match="2 others are answered or wait already"):
        line.join()


async def test_a_visitor_sees_the_place_in_the_line_and_is_answered_in_turn(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(1, 4))
    with answering.line.join() as busy:
        told = ask(answering, "visitor")
        assert (await anext(told)).summary.startswith("You are number 1 in the line")
        busy.__exit__()
        assert "12" in [progress async for progress in told][-1].text


async def test_who_waits_can_stop(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(1, 4))
    with answering.line.join():
        told = ask(answering, "visitor")
        await anext(told)
        answering.visitors.stop("visitor", "chat")
        assert [progress.summary async for progress in told] == ["The answer was stopped."]
        assert answering.line.waiting == 0


async def test_an_error_is_told_in_words(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(1, 0))
    with answering.line.join():
        assert (
            "⚠ 1 others are answered or wait already"
            in [each async for each in ask(answering, "visitor")][-1].summary
        )


async def test_a_whole_number_is_a_temperature_too(engine: AnswerEngine) -> None:
    assert (await all_of(answer_to(engine, ASKED, temperature=2, seed=1)))[-1].summary


async def test_what_nobody_expected_is_told_too(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(1, 0))

    def broken(engine: AnswerEngine) -> Any:
        raise ZeroDivisionError

    [told] = [each async for each in answering.answer("one", "one", "chat", "tiny-chat", broken)]
    assert told.summary == "⚠ an internal error; the log of the server has the details"
    assert answering.line.running == 0


async def test_a_visitor_has_so_many_answers_a_minute(engine: AnswerEngine) -> None:
    answering = Answering({"tiny-chat": engine}, WaitingLine(4, 4), Allowance(1))
    assert "12" in [each async for each in ask(answering, "one")][-1].text
    [refused] = [each async for each in ask(answering, "one")]
    assert "ask again in" in refused.summary
    assert "12" in [each async for each in ask(answering, "other")][-1].text


def test_after_a_minute_a_visitor_may_ask_again() -> None:
    clock = SetClock()
    allowance = Allowance(2, clock)
    assert [allowance.wait_s("visitor") for _ in range(3)] == [0.0, 0.0, 60.0]
    clock.seconds = 60.0
    assert allowance.wait_s("visitor") == 0.0


def test_a_page_that_is_loaded_anew_is_no_new_visitor() -> None:
    assert counted_as("session-1", "192.0.2.7", None) == counted_as("session-2", "192.0.2.7", "another name")


def test_on_this_machine_each_page_is_a_visitor() -> None:
    assert counted_as("session-1", "127.0.0.1", None) != counted_as("session-2", "127.0.0.1", None)


def ask(
    answering: Answering, visitor: str, question: Any = ASKED, turn: int | None = None
) -> AsyncGenerator[AnswerProgress, None]:
    make = partial(chat_request, history=[question], options=ChatOptions())
    return answering.answer(visitor, visitor, "chat", "tiny-chat", make, turn)


async def all_told(told: AsyncGenerator[AnswerProgress, None]) -> list[AnswerProgress]:
    return [progress async for progress in told]


# what is shown


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


def test_the_page_ends_where_gradio_stumbles_on_the_way(swarm: LocalSwarm) -> None:
    def stumble() -> None:
        raise RuntimeError("deque mutated during iteration")

    with Playground([swarm.model()]) as playground:
        playground.page.app.stop_event.set = stumble  # type: ignore[method-assign]
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(playground.url, timeout=20)


def test_the_page_names_no_other_place() -> None:
    """No font comes from elsewhere; what a browser asks of whom is checked in tests/browser."""
    assert theme()._stylesheets == []


async def test_the_swarm_tab_tells_what_would_break(swarm: LocalSwarm, engine: AnswerEngine) -> None:
    shown = swarm_html(await FreshStatus(engine.model.connection).get(), "tiny-chat")
    assert shown.count("the model would stop: no other has") == 2
    assert "if it left" in shown


async def test_many_who_look_at_the_swarm_look_once(engine: AnswerEngine) -> None:
    fresh = FreshStatus(engine.model.connection)
    first, second = await asyncio.gather(fresh.get(), fresh.get())
    assert first is second


def test_the_snippets_have_the_settings_of_the_page() -> None:
    options = ChatOptions(system="It's brief.", temperature=0.7, top_k=5, stops=("END",))
    call = ast.parse(as_python("tiny-chat", options))
    assert "extra_body={'top_k': 5}" in ast.unparse(call)
    words = shlex.split(as_curl("tiny-chat", options))
    assert json.loads(words[-1])["messages"][0] == {"role": "system", "content": "It's brief."}
    assert json.loads(words[-1])["stop"] == ["END"]


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("kept_fork_server")
def test_the_command_serves_the_page_until_ctrl_c() -> None:
    with LocalSwarm("tiny-chat", num_stages=1) as swarm:
        page = start("playground", "--no-browser", "--join", swarm.initial_peers[0], until="listening")
        assert urllib.request.urlopen(page.event["url"], timeout=30).status == 200
        assert page.end_with(signal.SIGINT).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_on_a_terminal_with_a_display_the_demo_opens_the_page(tmp_path: Path) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    user, terminal = os.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "swarmkit.cli", "demo"],
            stdin=terminal,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "DISPLAY": ":0", "BROWSER": str(browser)},
            start_new_session=True,
        ) as process:
            wait_until(opened.exists, "the page is opened", within=120)
            assert urllib.request.urlopen(opened.read_text(), timeout=30).status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
    finally:
        os.close(user)
        os.close(terminal)
