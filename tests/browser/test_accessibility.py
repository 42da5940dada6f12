"""What axe-core finds on the pages, in both themes and on narrow and wide windows: nothing serious."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm

pytest.importorskip("gradio")
pytest.importorskip("axe_playwright_python")

from swarmkit_app.playground import Playground

from .conftest import FOCUS_SEEN, barriers, tab_to


@pytest.fixture(scope="module")
def playground() -> Iterator[Playground]:
    torch.set_num_threads(1)
    with (
        LocalSwarm("tiny-chat", num_stages=2, replicas=2, transport="memory") as swarm,
        Playground([swarm.model()], swarm) as playground,
    ):
        yield playground


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_playground_has_no_serious_barrier(
    new_page: Callable[..., Any],
    playground: Playground,
    screenshot: Callable[..., None],
    width: int,
    scheme: str,
) -> None:
    page = new_page(width=width, color_scheme=scheme)
    page.goto(playground.url)
    page.get_by_role("textbox", name="Message").fill("Hello! Who are you?")
    page.get_by_role("button", name="Send").click()
    page.locator("[data-testid=bot]").wait_for()
    page.get_by_text("Settings").click()
    found = {}
    for tab in ("Chat", "Completion", "Compare", "Swarm", "API"):
        show_tab(page, tab)
        if tab == "Completion":
            page.get_by_role("button", name="Go on").click()
            page.locator(".sk-tokens details").wait_for()
        page.wait_for_timeout(500)  # tabs fade in, and text is pale until then
        if serious := barriers(page):
            found[tab] = serious
        screenshot(page, tab)
    assert found == {}


def show_tab(page: Any, name: str) -> None:
    """Open a tab, which on a narrow window may be in a menu."""
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():
        page.locator(".overflow-menu button").first.click()
        tab = page.locator(".overflow-dropdown").get_by_text(name)
    tab.click()


def test_an_answer_can_be_asked_for_and_stopped_by_keyboard(page: Any, playground: Playground) -> None:
    page.goto(playground.url)
    page.get_by_role("textbox", name="Message").focus()
    page.keyboard.type("Tell me a story about a fox.")
    page.keyboard.press("Enter")
    page.locator("[data-testid=bot]").wait_for()
    tab_to(page, "focused.textContent.trim() === 'Stop'")
    assert page.evaluate(FOCUS_SEEN)
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => /was stopped|the first after/.test(document.querySelector('.sk-summary').textContent)"
    )


BUTTONS_SEEN = """() => [...document.querySelectorAll('button, [role=tab], input, textarea, select, summary')]
    .filter((each) => each.offsetParent !== null && !each.disabled && each.type !== 'file')
    .map((each) => (each.ariaLabel || each.textContent || each.labels?.[0]?.textContent || '').trim())"""

FOCUSED = """() => {
    const it = document.activeElement;
    return (it.ariaLabel || it.textContent || it.labels?.[0]?.textContent || '').trim();
}"""


@pytest.mark.parametrize("tab", ["Chat", "Completion", "Compare"])
def test_whatever_can_be_clicked_can_be_reached_by_keyboard(
    page: Any, playground: Playground, tab: str
) -> None:
    page.goto(playground.url)
    page.get_by_role("textbox", name="Message").wait_for()
    page.get_by_role("tab", name=tab).click()
    page.wait_for_timeout(500)
    wanted = {name for name in page.evaluate(BUTTONS_SEEN) if name}
    reached, unseen = set(), set()
    for _ in range(80):
        page.keyboard.press("Tab")
        name = page.evaluate(FOCUSED)
        reached.add(name)
        if name in wanted and not page.evaluate(FOCUS_SEEN):
            unseen.add(name)
    assert wanted - reached == set()
    assert unseen == set()


def test_tabs_are_chosen_by_keyboard(page: Any, playground: Playground) -> None:
    page.goto(playground.url)
    page.get_by_role("tab", name="Chat").focus()
    tab_to(page, "focused.textContent.trim() === 'Completion'")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Go on").wait_for()
