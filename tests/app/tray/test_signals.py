"""From what a computer and a desktop say to the same tokens elsewhere: nothing is pretended in between.

The worker senses this computer itself. The desktop is a message bus on which logind, a player, GameMode and
the network answer, and a Wayland compositor; a real tray listens to them. The node is a real one, and a
session is open on it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("PIL")
pytest.importorskip("dbus_fast")

from swarmkit import Server
from swarmkit.worker.node_supervisor import NODE_COMMAND
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.sensing.dbus import close_desktop_bus
from swarmkit.worker.sensing.machine import OwnMachine, online
from swarmkit.worker.sensing.wayland import QUIET_S
from tests.worker.compositor import SaidCompositor
from tests.worker.desktops import SaidDesktop, message_bus, missing
from tests.worker.elsewhere import AFTER, BEFORE, PROMPT, client_of, expected, more, slow_server
from tests.worker.worlds import RunningWorker, not_ours

from .conftest import StartTray

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="a Linux desktop is asked"),
    pytest.mark.skipif(bool(missing("dbus-daemon")), reason=missing("dbus-daemon")),
]

BURN = "while True: pass"


@dataclass
class World:
    """All that can happen to a computer that is lent, and the worker on it."""

    worker: RunningWorker
    desktop: SaidDesktop
    compositor: SaidCompositor
    plug: Path
    """The file in which the kernel says whether the computer is plugged in."""
    running: ExitStack
    """Ends the programs of others."""

    def rules(self, **rules: Any) -> None:
        self.worker.client.change_settings({"rules": rules})

    def run(self, *command: str | Path) -> None:
        self.running.enter_context(not_ours(*command))


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as programs:
        yield programs


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A laptop with a battery, as the kernel shows it to psutil."""
    supplies = tmp_path / "power_supply"
    monkeypatch.setattr("psutil._pslinux.POWER_SUPPLY_PATH", str(supplies))
    battery = {"capacity": "80", "status": "Charging", "energy_now": "8", "energy_full": "10"}
    for name, files in (
        ("BAT0", {**battery, "power_now": "1", "type": "Battery"}),
        ("AC0", {"online": "1", "type": "Mains"}),
    ):
        (supplies / name).mkdir(parents=True)
        for file, words in files.items():
            (supplies / name / file).write_text(words)
    return supplies / "AC0" / "online"


@pytest.fixture
def desktop(monkeypatch: pytest.MonkeyPatch) -> Iterator[SaidDesktop]:
    with message_bus() as bus:
        for variable in ("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"):
            monkeypatch.setenv(variable, bus)
        said = SaidDesktop(bus)
        said.say("login", LockedHint=False, Remote=False)
        said.say("network", Metered=4)
        yield said
        close_desktop_bus()
        said.close()


@pytest.fixture
def compositor(tmp_path: Path) -> Iterator[SaidCompositor]:
    said = SaidCompositor(tmp_path / "wayland-0")
    yield said
    said.close()


@pytest.fixture(scope="module")
def other() -> Iterator[Server]:
    with slow_server() as server:
        yield server


@pytest.fixture
def worker(places: WorkerPlaces, desktop: SaidDesktop, plug: Path) -> Iterator[RunningWorker]:
    running = RunningWorker(places, OwnMachine(), node_command=NODE_COMMAND)
    yield running
    running.close()


@pytest.fixture
def world(
    worker: RunningWorker,
    desktop: SaidDesktop,
    compositor: SaidCompositor,
    plug: Path,
    running: ExitStack,
    start_tray: StartTray,
    other: Server,
) -> World:
    """Its person has chosen and gone away, and it serves."""
    if not online():
        pytest.skip("this computer has no network, without which the worker joins no swarm")
    start_tray(
        "--host", "none",
        XDG_SESSION_TYPE="wayland", WAYLAND_DISPLAY=str(compositor.path),
        DBUS_SESSION_BUS_ADDRESS=desktop.address, DBUS_SYSTEM_BUS_ADDRESS=desktop.address,
    )  # fmt: skip
    rules = {
        "away_after_s": QUIET_S,
        # What else this computer does, and who is logged in, is not what is asked here.
        "busy_cpu": {"in_use": 1.0, "away": 1.0},
        "pause_for_remote_session": False,
    }
    limits = {
        "cpu_cores": {"in_use": 1, "away": 1},
        "disk_free_bytes": {"in_use": 0, "away": 0},
        "temperature_c": {"in_use": 110, "away": 110},
    }
    worker.serve(
        {"model": "tiny-chat", "join": other.addresses}, rules={"presence": "desktop", **rules}, limits=limits
    )
    worker.wait_until(lambda status: status.reason == "in_use", "the tray tells that somebody is here")
    compositor.say(is_idle=True)
    worker.wait_for("serving")
    return World(worker, desktop, compositor, plug, running)


def a_game(world: World) -> None:
    name = f"game-{os.getpid()}"
    program = world.plug.parents[2] / name
    program.symlink_to("/bin/sleep")
    world.rules(programs=[name])
    world.run(program, "600")


def load(world: World) -> None:
    for _ in range(psutil.cpu_count() or 1):
        world.run(sys.executable, "-c", BURN)
    world.rules(busy_cpu={"in_use": 0.3, "away": 0.3})


def a_session_from_afar(world: World) -> None:
    world.rules(pause_for_remote_session=True)
    world.desktop.say("login", Remote=True)


def a_full_disk(world: World) -> None:
    free = psutil.disk_usage(str(world.plug)).free
    world.worker.client.change_settings(
        {"limits": {"disk_free_bytes": {"in_use": 2 * free, "away": 2 * free}}}
    )


HAPPENINGS: dict[str, Callable[[World], object]] = {
    "battery": lambda world: world.plug.write_text("0"),
    "metered": lambda world: world.desktop.say("network", Metered=1),
    "busy_cpu": load,
    "program": a_game,
    "full_screen": lambda world: world.desktop.say("game", ClientCount=1),
    "film": lambda world: world.desktop.say("player", PlaybackStatus="Playing"),
    "remote_session": a_session_from_afar,
    "in_use": lambda world: world.compositor.say(is_idle=False),
    "presence_unknown": lambda world: world.compositor.close(),
    "disk": a_full_disk,
}


@pytest.mark.parametrize("reason", HAPPENINGS)
def test_what_happens_here_ends_the_work_and_sessions_go_on_elsewhere(
    world: World, other: Server, reason: str
) -> None:
    node = world.worker.status().node
    assert node is not None
    pids = used_by(node.pid).pids
    with client_of(other) as model, model.session() as session:
        tokens = more(model, session, PROMPT, BEFORE)
        began_at = {hop.peer_id for step in model.trace for hop in step.hops}
        HAPPENINGS[reason](world)
        world.worker.wait_until(
            lambda status: (status.state, status.reason) == ("paused", reason), f"it pauses for {reason}"
        )
        assert not any(psutil.pid_exists(pid) for pid in pids)
        tokens = more(model, session, tokens, AFTER)
        ended_at = {hop.peer_id for hop in model.trace[-1].hops}
    assert (node.peer_id in began_at, ended_at) == (True, {other.peer_id})
    assert tokens[0].tolist() == expected(BEFORE + AFTER)


def test_the_computer_is_lent_again_when_the_person_has_gone(world: World) -> None:
    world.compositor.say(is_idle=False)
    world.worker.wait_for("paused")
    world.compositor.say(is_idle=True)
    world.worker.wait_for("serving")
