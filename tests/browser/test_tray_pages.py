"""The tray's pages in a browser: first steps, dashboard and settings, as a person meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from swarmkit_app.tray.pages import TrayPages

from swarmkit.net.transport.invite import InviteLink, write_link
from swarmkit.worker.places import WorkerPlaces
from tests.worker.worlds import RunningWorker, SaidMachine, not_ours

from .conftest import FOCUS_SEEN, barriers, tab_to


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RunningWorker]:
    running = RunningWorker(WorkerPlaces.inside(tmp_path), SaidMachine())
    yield running
    running.close()


@pytest.fixture
def pages(worker: RunningWorker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TrayPages]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    with TrayPages(worker.client, worker.places, lambda: None) as pages:
        yield pages


def test_first_steps_end_with_a_worker_that_serves(
    new_page: Callable[..., Any],
    pages: TrayPages,
    worker: RunningWorker,
    screenshot: Callable[..., None],
) -> None:
    worker.client.change_settings({"rules": {"presence": "headless"}})
    page = new_page()
    page.goto(pages.link("wizard"))
    screenshot(page, "1")
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Test it").click()
    page.get_by_text("It works").wait_for()
    screenshot(page, "2")
    page.get_by_role("button", name="Go on").click()
    page.get_by_label("Only while nobody uses this computer").wait_for()
    screenshot(page, "3")
    page.get_by_role("button", name="Go on").click()
    page.get_by_label("Model").fill("quick")
    screenshot(page, "4")
    page.get_by_role("button", name="Begin to lend").click()
    worker.wait_for("working")
    page.locator("#words", has_text="Working for 1 session").wait_for()
    screenshot(page, "dashboard")


def test_an_invite_link_names_its_swarm_and_its_model(
    new_page: Callable[..., Any], pages: TrayPages, screenshot: Callable[..., None]
) -> None:
    link = write_link(InviteLink(("/ip4/192.0.2.7/tcp/31337/p2p/Q",), 4e9, model="some/model"))
    page = new_page()
    page.goto(pages.link("wizard"))
    for _ in range(3):
        page.get_by_role("button", name="Go on").click()
    page.get_by_label("Invite link or addresses").fill(link)
    page.get_by_label("Model").click()
    page.get_by_text("The link leads to a public swarm of some/model").wait_for()
    screenshot(page)
    assert page.get_by_label("Model").input_value() == "some/model"


def test_do_nothing_yet_lends_nothing(
    new_page: Callable[..., Any], pages: TrayPages, worker: RunningWorker
) -> None:
    page = new_page()
    page.goto(pages.link("wizard"))
    page.get_by_role("button", name="Not now").click()
    page.locator("#words").wait_for()
    assert not worker.client.settings().agreed


def test_a_pause_is_one_click(new_page: Callable[..., Any], pages: TrayPages, worker: RunningWorker) -> None:
    worker.serve()
    worker.wait_for("working")
    page = new_page()
    page.goto(pages.link())
    page.get_by_role("button", name="Pause for 1 hour").click()
    page.get_by_role("button", name="Resume").wait_for()
    worker.wait_for("paused")


def test_a_setting_is_kept(new_page: Callable[..., Any], pages: TrayPages, worker: RunningWorker) -> None:
    page = new_page()
    page.goto(pages.link("settings"))
    page.get_by_label("Upload while you are away").fill("8")
    page.get_by_label("sunday 3 o'clock").uncheck()
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved.").wait_for()
    settings = worker.client.settings()
    assert settings.limits.upload_bytes_per_s.away == 1_000_000
    assert settings.rules.schedule["sunday"] == "###.####################"


def test_a_program_that_runs_is_chosen_from_a_list(
    new_page: Callable[..., Any], pages: TrayPages, worker: RunningWorker
) -> None:
    with not_ours("sleep", "600"):
        page = new_page()
        page.goto(pages.link("settings"))
        page.get_by_label("Add a program that runs now").locator("option", has_text="sleep").wait_for(
            state="attached"
        )
        page.get_by_label("Add a program that runs now").select_option("sleep")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved.").wait_for()
    assert worker.client.settings().rules.programs == ("sleep",)


def test_a_value_that_is_not_allowed_is_told(
    new_page: Callable[..., Any], pages: TrayPages, worker: RunningWorker
) -> None:
    page = new_page()
    page.goto(pages.link("settings"))
    page.get_by_label("Processor cores while you are away").fill("0")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("alert").get_by_text("limits.cpu_cores.away").wait_for()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_have_no_serious_barrier(
    new_page: Callable[..., Any],
    pages: TrayPages,
    worker: RunningWorker,
    screenshot: Callable[..., None],
    width: int,
    scheme: str,
) -> None:
    page = new_page(width=width, color_scheme=scheme)
    page.goto(pages.link("wizard"))
    found = {}
    for name, shown in (
        ("wizard", "Lend this computer to a swarm"),
        ("dashboard", "What swarmkit keeps on this computer"),
        ("settings", "How much it may use"),
        ("log", "What the worker wrote last"),
    ):
        page.evaluate(f"() => {{ location.hash = '{name}'; }}")
        page.get_by_role("heading", name=shown).wait_for()
        if serious := barriers(page):
            found[name] = serious
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        screenshot(page, f"{name}-{scheme}-{width}")
    assert found == {}


def test_pausing_needs_no_mouse(
    new_page: Callable[..., Any], pages: TrayPages, worker: RunningWorker
) -> None:
    worker.serve()
    worker.wait_for("working")
    page = new_page()
    page.goto(pages.link())
    page.get_by_role("button", name="Stop at once").wait_for()
    tab_to(page, "focused.textContent === 'Stop at once'")
    assert page.evaluate(FOCUS_SEEN)
    page.keyboard.press("Enter")
    worker.wait_for("paused")
