"""What axe-core finds on the pages, in both themes and on narrow and wide windows: nothing serious."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm

pytest.importorskip("gradio")
pytest.importorskip("axe_playwright_python")

from axe_playwright_python.sync_playwright import Axe
from swarmkit_app.playground import Playground


@pytest.fixture(scope="module")
def playground() -> Iterator[Playground]:
    torch.set_num_threads(1)
    with (
        LocalSwarm("tiny-chat", num_stages=2, replicas=2, transport="memory") as swarm,
        Playground([swarm.model()], swarm) as playground,
    ):
        yield playground


def serious(page: Any) -> list[str]:
    """What is wrong, and where."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['target']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_playground_has_no_serious_barrier(
    new_page: Callable[..., Any], playground: Playground, width: int, scheme: str
) -> None:
    page = new_page(width=width, color_scheme=scheme)
    page.goto(playground.url)
    page.get_by_role("textbox", name="Message").fill("Hello! Who are you?")
    page.get_by_role("button", name="Send").click()
    page.locator("[data-testid=bot]").wait_for()
    page.get_by_text("Settings").click()
    found = {}
    for tab in ("Chat", "Swarm", "API"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)  # tabs fade in, and text is pale until then
        if barriers := serious(page):
            found[tab] = barriers
    assert found == {}


def test_an_answer_can_be_asked_for_and_stopped_by_keyboard(page: Any, playground: Playground) -> None:
    page.goto(playground.url)
    page.get_by_role("textbox", name="Message").focus()
    page.keyboard.type("Hello! Who are you?")
    page.keyboard.press("Enter")
    page.locator("[data-testid=bot]").wait_for()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == "Stop":
            break
    else:
        pytest.fail("Stop cannot be reached by keyboard")
    page.keyboard.press("Enter")
