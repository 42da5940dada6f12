"""The playground as a visitor uses it: ask, watch, stop, edit, kill a server, come back."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm
from swarmkit.tinychat import CHECKPOINT

from ..waiting import wait_until

pytest.importorskip("gradio")

from swarmkit_app.playground import Playground

LONG = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    torch.set_num_threads(1)
    with LocalSwarm("tiny-chat", num_stages=2, replicas=3, transport="memory") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def playground(swarm: LocalSwarm) -> Iterator[Playground]:
    with Playground([swarm.model()], swarm) as playground:
        yield playground


@pytest.fixture
def visit(new_page: Callable[..., Any], playground: Playground) -> Callable[..., Any]:
    """Opens the playground in a new window."""

    def go(**options: Any) -> Any:
        page = new_page(**options)
        page.goto(playground.url)
        page.get_by_role("textbox", name="Message").wait_for()
        return page

    return go


def ask(page: Any, text: str) -> None:
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("button", name="Send").click()


def stop(page: Any) -> None:
    page.locator("button.sk-stop:visible").click()


def last_answer(page: Any) -> Any:
    return page.locator("[data-testid=bot]").last


def wait_for_end(page: Any) -> None:
    page.wait_for_function("() => /the first after/.test(document.querySelector('.sk-summary').textContent)")
    summary = page.locator(".prose.sk-summary")
    seen = ""

    def still() -> bool:
        nonlocal seen
        before, seen = seen, summary.inner_text() + last_answer(page).inner_text()
        page.wait_for_timeout(700)
        return before == seen

    wait_until(still, "the answer has ended", within=60)


def wait_for_answer(page: Any, text: str) -> None:
    page.wait_for_function(
        f"() => [...document.querySelectorAll('[data-testid=bot]')].at(-1)?.textContent.includes('{text}')"
    )


def ask_and_edit(page: Any, text: str, edited: str) -> None:
    """Ask a question, wait for the answer, and ask the question again in other words."""
    ask(page, text)
    wait_for_end(page)
    page.locator("[data-testid=user]").first.hover()
    page.get_by_label("Edit").first.click()
    page.locator("textarea:visible").first.fill(edited)
    page.get_by_label("Submit").first.click()


def test_a_visitor_asks_and_sees_answer_route_and_speed(
    visit: Callable[..., Any], screenshot: Callable[..., None]
) -> None:
    page = visit()
    ask(page, "Hello! Who are you?")
    page.wait_for_function("document.querySelector('.sk-picture svg').textContent.includes('ms')")
    wait_for_end(page)
    assert len(last_answer(page).inner_text()) > 10
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s", page.locator(".prose.sk-summary").inner_text())
    screenshot(page)


def test_stop_keeps_what_came_and_frees_the_session(visit: Callable[..., Any], swarm: LocalSwarm) -> None:
    page = visit()
    page.get_by_text("Settings").click()
    ask(page, LONG)
    last_answer(page).wait_for()
    stop(page)
    page.wait_for_function(
        "() => /was stopped|the first after/.test(document.querySelector('.sk-summary').textContent)"
    )
    ask(page, "What is 7 + 5?")
    wait_for_end(page)
    assert "12" in last_answer(page).inner_text()


def test_a_server_is_killed_and_another_takes_over(
    visit: Callable[..., Any], swarm: LocalSwarm, screenshot: Callable[..., None]
) -> None:
    page = visit()
    alive = sum(server.alive for server in swarm.servers)
    ask(page, LONG)
    last_answer(page).wait_for()
    page.get_by_role("combobox", name="Server").click()
    page.get_by_role("option").first.click()
    page.get_by_role("button", name="Kill this server").click()
    wait_until(lambda: sum(server.alive for server in swarm.servers) == alive - 1, "one server less")
    wait_for_end(page)
    ask(page, LONG)
    wait_for_end(page)
    assert "The end." in last_answer(page).inner_text()
    page.get_by_role("button", name="Add a server").click()
    wait_until(lambda: sum(server.alive for server in swarm.servers) == alive, "one server more")
    screenshot(page)


def test_an_answer_to_an_edited_question_can_be_stopped(visit: Callable[..., Any]) -> None:
    page = visit()
    ask_and_edit(page, "What is 7 + 5?", "What is 2 + 3?")
    page.wait_for_function("document.querySelector('[data-testid=bot]')?.textContent.includes('5')")
    assert page.locator("[data-testid=user]").count() == 1
    stop(page)
    page.get_by_role("button", name="Regenerate").click()
    wait_for_end(page)
    assert "5" in last_answer(page).inner_text()


def test_the_stop_of_one_visitor_touches_no_other(visit: Callable[..., Any]) -> None:
    one, other = visit(), visit()
    ask(one, LONG)
    ask(other, LONG)
    last_answer(one).wait_for()
    stop(one)
    wait_for_end(other)
    assert "The end." in last_answer(other).inner_text()


def test_escape_stops_an_answer(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, LONG)
    last_answer(page).wait_for()
    page.keyboard.press("Escape")
    page.wait_for_function("() => /was stopped/.test(document.querySelector('.sk-summary').textContent)")


class HeldBack:
    """Keeps back a page's first request for an answer to a question, as a slow network would."""

    def __init__(self, page: Any, question: str) -> None:
        self._page, self._question = page, question
        self._route: Any = None
        page.route("**/queue/join*", self._take)

    def _take(self, route: Any) -> None:
        if self._route is None and self._question in (route.request.post_data or ""):
            self._route = route
        else:
            route.continue_()

    def wait(self) -> None:
        def is_held() -> bool:
            self._page.wait_for_timeout(20)
            return self._route is not None

        wait_until(is_held, "the request is on its way")

    def let_go(self) -> None:
        self._route.continue_()


def test_a_stop_that_overtakes_its_answer_ends_it(visit: Callable[..., Any]) -> None:
    page = visit()
    held = HeldBack(page, LONG)
    ask(page, LONG)
    held.wait()
    with page.expect_response(lambda response: "/run/" in response.url):
        stop(page)
    held.let_go()
    page.wait_for_function("() => /was stopped/.test(document.querySelector('.sk-summary').textContent)")
    ask(page, "What is 7 + 5?")
    wait_for_answer(page, "12")


def test_a_new_chat_that_overtakes_an_answer_stays_empty(
    visit: Callable[..., Any], playground: Playground
) -> None:
    page = visit()
    held = HeldBack(page, LONG)
    ask(page, LONG)
    held.wait()
    over = playground.answering.visitors.over
    others = set(over)
    page.get_by_role("button", name="New chat").click()

    def is_cleared() -> bool:
        page.wait_for_timeout(20)
        return any(marks.left for key, marks in over.items() if key not in others)

    wait_until(is_cleared, "the place of the answer is cleared")
    held.let_go()
    # The answer that comes late empties the box once more, as it begins.
    page.wait_for_function(
        "() => document.querySelector('textarea[placeholder=\"Ask something\"]').value === ''"
    )
    ask(page, "What is 7 + 5?")
    wait_for_answer(page, "12")
    assert page.locator("[data-testid=user]").count() == 1


def test_a_question_during_an_answer_is_answered(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, LONG)
    last_answer(page).wait_for()
    ask(page, "What is 7 + 5?")
    wait_for_answer(page, "12")
    assert page.locator("[data-testid=user]").count() == 2


def choose_conversation(page: Any, name: str) -> None:
    page.get_by_role("combobox", name="Conversations in this browser").click()
    page.get_by_role("option", name=name).click()


def conversations(page: Any) -> list[str]:
    page.get_by_role("combobox", name="Conversations in this browser").click()
    names: list[str] = page.get_by_role("option").all_inner_texts()
    page.keyboard.press("Escape")
    return names


def test_an_edit_keeps_the_version_before(visit: Callable[..., Any], screenshot: Callable[..., None]) -> None:
    page = visit()
    ask_and_edit(page, "What is 7 + 5?", "What is 2 + 3?")
    wait_for_answer(page, "5.")
    page.get_by_role("combobox", name="Conversations in this browser").click()
    screenshot(page)
    page.get_by_role("option", name="What is 7 + 5? · version 1").click()
    wait_for_answer(page, "12")
    choose_conversation(page, "What is 2 + 3? · version 2")
    wait_for_answer(page, "5.")


def test_a_conversation_is_there_after_a_reload_and_goes_on(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, "What is 7 + 5?")
    wait_for_end(page)
    page.reload()
    wait_for_answer(page, "12")
    page.get_by_role("button", name="New chat").click()
    page.wait_for_function("() => !document.querySelector('[data-testid=user]')")
    ask(page, LONG)
    wait_for_end(page)
    choose_conversation(page, "What is 7 + 5?")
    wait_for_answer(page, "12")
    ask(page, "What is 2 + 3?")
    wait_for_answer(page, "5.")
    assert page.locator("[data-testid=user]").count() == 2


def test_a_conversation_that_is_not_to_be_kept_is_gone_with_the_page(visit: Callable[..., Any]) -> None:
    page = visit()
    page.get_by_label("Keep them").uncheck()
    ask(page, "What is 7 + 5?")
    wait_for_end(page)
    assert "7 + 5" not in page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    page.reload()
    page.get_by_role("textbox", name="Message").wait_for()
    assert not page.get_by_label("Keep them").is_checked()
    assert conversations(page) == []


def test_all_conversations_are_forgotten_at_a_click(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, "What is 7 + 5?")
    wait_for_end(page)
    assert "7 + 5" in page.evaluate("JSON.stringify(localStorage)")
    page.get_by_role("button", name="Forget all").click()
    page.wait_for_function("() => !document.querySelector('[data-testid=user]')")
    assert "7 + 5" not in page.evaluate("JSON.stringify([localStorage, sessionStorage])")


@pytest.mark.timeout(400)
def test_fifty_rounds_of_send_and_stop_leave_nothing(visit: Callable[..., Any], swarm: LocalSwarm) -> None:
    page = visit()
    for number in range(50):
        page.get_by_role("button", name="New chat").click()
        page.wait_for_function("() => !document.querySelector('[data-testid=user]')")
        ask(page, f"{LONG} Make it number {number}.")
        last_answer(page).wait_for()
        stop(page)
    ask(page, "What is 7 + 5?")
    wait_for_end(page)
    assert "12" in last_answer(page).inner_text()
    held = [server.serving.sessions for server in swarm.servers if server.alive]  # type: ignore[attr-defined]
    wait_until(lambda: not any(service.sessions for service in held), "no session is open")


def test_visitors_see_their_place_in_the_line(
    new_page: Callable[..., Any], swarm: LocalSwarm, screenshot: Callable[..., None]
) -> None:
    with Playground([swarm.model()], max_running=1) as narrow:
        pages = [new_page() for _ in range(4)]
        for page in pages:
            page.goto(narrow.url)
            page.get_by_role("textbox", name="Message").fill(LONG)
        last = pages[-1]
        last.evaluate(
            """() => {
                const summary = document.querySelector('.sk-summary');
                window.told = [];
                new MutationObserver(() => window.told.push(summary.textContent))
                    .observe(summary, {childList: true, subtree: true, characterData: true});
            }"""
        )
        for page in pages:
            page.get_by_role("button", name="Send").click()
        last.wait_for_function("() => window.told.some((text) => text.includes('in the line'))")
        screenshot(last)
        for page in pages:
            wait_for_end(page)
            assert "The end." in last_answer(page).inner_text()


def test_a_model_that_cannot_answer_says_why_when_it_is_chosen(
    new_page: Callable[..., Any], swarm: LocalSwarm, screenshot: Callable[..., None], tmp_path: Path
) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "other-chat")
    with LocalSwarm(str(tmp_path / "other-chat"), num_stages=2, transport="memory") as other:
        model = other.model()
        with Playground([swarm.model(), model]) as playground:
            page = new_page()
            page.goto(playground.url)
            page.get_by_text("Settings").click()
            page.get_by_text("Every block of this model has").wait_for()
            other.servers[1].stop()
            wait_until(
                lambda: model.connection.client.known.unserved(0, 8),
                "the client knows that blocks are missing",
            )
            page.get_by_role("combobox", name="Model", exact=True).click()
            page.get_by_role("option", name="other-chat").click()
            page.get_by_text("No server has the blocks 4:8").wait_for()
            screenshot(page)


def test_a_text_is_gone_on_with_in_colours(
    visit: Callable[..., Any], screenshot: Callable[..., None]
) -> None:
    page = visit()
    page.get_by_role("tab", name="Completion").click()
    page.get_by_role("button", name="Go on").click()
    page.locator(".sk-tokens summary").click()
    assert page.locator(".sk-tokens td").count() > 8
    assert "%" in page.locator(".sk-tokens span[title]").first.get_attribute("title")
    screenshot(page)


def test_two_settings_answer_side_by_side(visit: Callable[..., Any], screenshot: Callable[..., None]) -> None:
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("textbox", name="Question").fill(LONG)
    page.get_by_role("button", name="Ask both").click()
    page.wait_for_function(
        """() => [...document.querySelectorAll('.sk-answer textarea')]
            .every((each) => each.value.includes('The end.'))"""
    )
    wait_until(
        lambda: page.get_by_text("the first after").locator("visible=true").count() == 2, "both speeds"
    )
    screenshot(page)


def test_an_answer_that_was_stopped_is_continued(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, LONG)
    last_answer(page).wait_for()
    page.keyboard.press("Escape")
    page.wait_for_function("() => /was stopped/.test(document.querySelector('.sk-summary').textContent)")
    begun = last_answer(page).inner_text()
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('[data-testid=bot]')].at(-1).textContent.includes('The end.')"
    )
    assert last_answer(page).inner_text().startswith(begun.strip())


def test_after_a_reload_the_page_works_again(visit: Callable[..., Any]) -> None:
    page = visit()
    ask(page, LONG)
    page.reload()
    ask(page, "What is 7 + 5?")
    wait_for_end(page)
    assert "12" in last_answer(page).inner_text()


def test_the_swarm_tab_shows_every_server(
    visit: Callable[..., Any], swarm: LocalSwarm, screenshot: Callable[..., None]
) -> None:
    page = visit()
    page.get_by_role("tab", name="Swarm").click()
    rows = page.locator("table tbody tr:visible")
    rows.first.wait_for()
    assert rows.count() >= sum(server.alive for server in swarm.servers)
    heads = page.locator("table th:visible").all_inner_texts()
    assert {"tokens/s", "free cache", "round trip", "up for", "version", "if it left"} <= set(heads)
    screenshot(page)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_in_both_themes(
    visit: Callable[..., Any], screenshot: Callable[..., None], width: int, scheme: str
) -> None:
    page = visit(width=width, color_scheme=scheme)
    ask(page, "Hello! Who are you?")
    wait_for_end(page)
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 1, f"the page is {wide} pixels too wide"
    screenshot(page)
