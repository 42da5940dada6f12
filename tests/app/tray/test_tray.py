"""A real tray on a real D-Bus: a panel shows it, and clicks reach the worker."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("dbus_fast")

from tests.waiting import eventually
from tests.worker.worlds import RunningWorker

from .conftest import StartTray
from .panel import Panel, session_bus

MOST_MEMORY_KIB = 80 * 1024


@pytest.fixture
def bus() -> Iterator[str]:
    with session_bus() as address:
        yield address


@pytest_asyncio.fixture
async def panel(bus: str) -> AsyncIterator[Panel]:
    panel = await Panel.on(bus)
    await panel.appear()
    yield panel
    await panel.close()


@pytest.fixture
def tray(worker: RunningWorker, start_tray: StartTray, bus: str) -> subprocess.Popen[str]:
    return start_tray("--host", "status-notifier", DBUS_SESSION_BUS_ADDRESS=bus)


async def shows(panel: Panel, icon: str, words: str) -> None:
    async def has_it() -> bool:
        return words in await panel.title(icon)

    await eventually(has_it, f"the tray says {words!r}")


async def test_a_new_worker_is_offered_and_quit_ends_the_tray_alone(
    panel: Panel, tray: subprocess.Popen[str], worker: RunningWorker
) -> None:
    icon = await panel.icon()
    await shows(panel, icon, "you have not chosen yet to lend this computer")

    await panel.click(icon, "Quit")

    assert tray.wait(60) == 0
    assert "page=wizard" in tray.communicate()[0]
    assert worker.status().state == "paused"


async def test_a_pause_in_the_menu_pauses_the_worker(
    panel: Panel, tray: subprocess.Popen[str], worker: RunningWorker
) -> None:
    worker.serve()
    worker.wait_for("working")
    icon = await panel.icon()
    await shows(panel, icon, "Working for 1 session")
    working = await panel.pixels(icon)

    await panel.click(icon, "Until I resume")

    worker.wait_for("paused")
    await shows(panel, icon, "Paused: until you resume")
    assert await panel.pixels(icon) != working


async def test_resume_in_the_menu_lets_it_serve_again(
    panel: Panel, tray: subprocess.Popen[str], worker: RunningWorker
) -> None:
    worker.serve()
    worker.client.pause()
    icon = await panel.icon()
    await shows(panel, icon, "until you resume")

    await panel.click(icon, "Resume")

    worker.wait_for("working")


async def test_a_panel_that_starts_later_shows_the_icon(
    bus: str, worker: RunningWorker, start_tray: StartTray
) -> None:
    start_tray("--host", "status-notifier", DBUS_SESSION_BUS_ADDRESS=bus)
    worker.wait_until(lambda status: status.lease, "the tray is there")
    panel = await Panel.on(bus)

    await panel.appear()

    assert (await panel.icon()).startswith("org.kde.StatusNotifierItem-")
    await panel.close()


async def test_the_worker_notices_that_the_tray_was_killed(
    panel: Panel, tray: subprocess.Popen[str], worker: RunningWorker
) -> None:
    worker.wait_until(lambda status: status.lease, "the tray is there")

    tray.kill()

    worker.wait_until(lambda status: status.lease is None, "the lease ends")


async def test_the_tray_is_small_and_has_no_torch(
    panel: Panel, tray: subprocess.Popen[str], worker: RunningWorker
) -> None:
    icon = await panel.icon()
    await shows(panel, icon, "you have not chosen")
    lines = Path(f"/proc/{tray.pid}/status").read_text().splitlines()
    memory_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    assert memory_kib < MOST_MEMORY_KIB
    assert "libtorch" not in Path(f"/proc/{tray.pid}/maps").read_text()


def test_a_second_tray_says_that_one_runs(worker: RunningWorker, start_tray: StartTray) -> None:
    start_tray("--host", "none")
    worker.wait_until(lambda status: status.lease, "the first tray is there")
    second = start_tray("--host", "none")
    assert second.wait(60) != 0
    assert "a tray of yours runs already" in second.communicate()[0]


def test_a_tray_ends_the_worker_that_it_has_started(start_tray: StartTray, tmp_path: Path) -> None:
    from swarmkit.worker.control.client import WorkerClient
    from swarmkit.worker.places import WorkerPlaces
    from tests.waiting import wait_until

    client = WorkerClient(WorkerPlaces.inside(tmp_path))
    tray = start_tray("--host", "none")
    wait_until(lambda: client.runs, "the tray starts a worker")

    tray.send_signal(signal.SIGINT)

    assert tray.wait(60) == 0
    assert not client.runs
