"""A headless Chromium for tests that do what a person does, and pages whose every request is known."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCREENSHOTS = Path(os.environ.get("SWARMKIT_SCREENSHOTS", "build/screenshots"))
"""Where each test leaves pictures of what it saw, to be looked at."""

OWN = re.compile(r"^(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|^(data|blob|about|file|chrome-error):")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here need a browser; `make browser` runs them."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium; Debian and Ubuntu have it as `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; afterwards none of them has asked anything of another machine."""
    foreign: list[str] = []
    contexts = []

    def open_page(width: int = 1280, height: int = 1000, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: OWN.match(request.url) or foreign.append(request.url))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    """A page of ordinary size."""
    return new_page()


@pytest.fixture
def screenshot(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps a picture of a page, or of a part of it, under the test's name."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def keep(shown: Any, name: str = "") -> None:
        test = re.sub(r"\W+", "-", request.node.name).strip("-")
        shown.screenshot(path=str(SCREENSHOTS / f"{test}{name and '-'}{name}.png"))

    return keep


def barriers(page: Any, context: str | None = None) -> list[str]:
    """What axe-core finds on a page, or in a part of it, that is serious: what is wrong, and where."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page, context=context).response["violations"]
    return [
        f"{each['id']}: {node['target']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def tab_to(page: Any, wanted: str, most: int = 60) -> None:
    """Press Tab until what has the focus fulfils a JavaScript condition on `focused`; it is outlined then."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate(f"(() => {{ const focused = document.activeElement; return {wanted}; }})()"):
            break
    else:
        pytest.fail(f"cannot be reached by keyboard: {wanted}")


FOCUS_SEEN = """(() => {
    const style = getComputedStyle(document.activeElement);
    return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0 || style.boxShadow !== 'none';
})()"""
"""Whether a person sees what has the focus."""


def free_port() -> int:
    """A port at which nothing listens now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
