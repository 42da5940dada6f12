"""The tray as a person meets it: an icon in a real panel, a menu opened with the mouse, keys, and notices."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarmkit_app.tray.face import Shape

from tests.waiting import wait_until
from tests.worker.worlds import RunningWorker

from .conftest import StartTray
from .desktop import SeenDesktop, seen_desktop, why_not

pytestmark = [
    pytest.mark.desktop,
    pytest.mark.skipif(bool(why_not()), reason=f"a desktop cannot be had here: {why_not()}"),
]


@pytest.fixture(scope="module")
def desktop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeenDesktop]:
    with seen_desktop(tmp_path_factory.mktemp("desktop")) as desktop:
        yield desktop


@pytest.fixture
def tray(worker: RunningWorker, start_tray: StartTray, desktop: SeenDesktop) -> subprocess.Popen[str]:
    names = ("DISPLAY", "DBUS_SESSION_BUS_ADDRESS", "XDG_SESSION_TYPE")
    return start_tray(**{name: desktop.environment[name] for name in names})


@pytest.fixture
def chosen(worker: RunningWorker) -> None:
    """The person has chosen, before the tray starts."""
    worker.serve()
    worker.wait_for("working")


@pytest.mark.parametrize(
    ("model", "shape"), [("unused", "serving"), ("quick", "working"), ("failing", "trouble")]
)
def test_each_state_has_its_icon_in_the_panel(
    worker: RunningWorker, desktop: SeenDesktop, tray: subprocess.Popen[str], model: str, shape: Shape
) -> None:
    desktop.wait_for_icon("paused")
    desktop.keep("paused")
    worker.serve(model)
    desktop.wait_for_icon(shape)
    desktop.keep(shape)


def test_a_tray_that_ends_takes_its_icon_away(
    chosen: None, desktop: SeenDesktop, tray: subprocess.Popen[str]
) -> None:
    desktop.wait_for_icon("working")
    tray.terminate()
    wait_until(lambda: desktop.icon("working") is None, "the icon has gone", every=0.2)


def test_a_pause_is_chosen_with_the_mouse_and_ended_so(
    chosen: None, worker: RunningWorker, desktop: SeenDesktop, tray: subprocess.Popen[str]
) -> None:
    desktop.open_menu("working")
    desktop.keep("menu")
    desktop.press("Down", "Right", "Down")  # the menu "Pause", and in it "For 1 hour"
    desktop.keep("menu-pause")
    desktop.press("Return")
    pause = worker.wait_for("paused").pause
    assert pause is not None
    assert pause.until == "seconds"

    desktop.open_menu("paused")
    desktop.press("Down", "Return")  # "Resume"
    worker.wait_for("working")


def test_a_click_on_the_icon_opens_the_dashboard(
    chosen: None, desktop: SeenDesktop, tray: subprocess.Popen[str]
) -> None:
    desktop.click(desktop.wait_for_icon("working"))
    assert tray.stdout is not None
    assert "page=dashboard" in tray.stdout.readline()


def test_quit_in_the_menu_ends_the_tray(
    chosen: None, worker: RunningWorker, desktop: SeenDesktop, tray: subprocess.Popen[str]
) -> None:
    desktop.open_menu("working")
    desktop.press("Up", "Return")  # the last line
    assert tray.wait(60) == 0
    assert worker.status().lease is None


def test_trouble_is_told_in_a_notice(
    chosen: None, worker: RunningWorker, desktop: SeenDesktop, tray: subprocess.Popen[str]
) -> None:
    desktop.wait_for_icon("working")
    wait_until(lambda: desktop.notices() == 0, "no notice of an earlier test is left", every=0.2)
    worker.serve("failing")
    wait_until(lambda: desktop.notices() > 0, "a notice appears", every=0.2)
    desktop.keep("notice")


def test_input_on_this_desktop_counts_as_somebody_here(
    worker: RunningWorker, desktop: SeenDesktop, tray: subprocess.Popen[str]
) -> None:
    worker.client.change_settings(
        {"agreed": True, "serve": {"model": "quick"}, "rules": {"away_after_s": 5.0}}
    )
    worker.wait_for("working")  # nobody touches anything
    desktop.do("mousemove", "200", "200")
    desktop.do("mousemove", "300", "300")
    assert worker.wait_for("paused").reason == "in_use"


def test_a_program_that_fills_this_screen_pauses_it(
    chosen: None, worker: RunningWorker, desktop: SeenDesktop, tray: subprocess.Popen[str], tmp_path: Path
) -> None:
    worker.client.change_settings({"rules": {"only_when_away": False, "presence": "desktop"}})
    desktop.wait_for_icon("working")
    with desktop.full_screen_program():
        assert worker.wait_for("paused").reason == "full_screen"
    worker.wait_for("working")
