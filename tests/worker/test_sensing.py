"""What is sensed is what a desktop says; what hangs or is missing is not known."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from swarmkit.worker.sensing import linux
from swarmkit.worker.sensing.dbus import SYSTEM, DesktopBus, close_desktop_bus
from swarmkit.worker.sensing.machine import OtherCpu, OwnMachine, SensingOrder, first_running, on_battery
from swarmkit.worker.sensing.metered import metered
from swarmkit.worker.sensing.probes import TRUSTED_S, Probe, UnknownError
from swarmkit.worker.sensing.session import OwnSession
from swarmkit.worker.sensing.session_kind import Desktop, desktop_of
from swarmkit.worker.sensing.session_providers import SessionProviders
from swarmkit.worker.sensing.sleep import LogindSleepWatch
from swarmkit.worker.sensing.x11 import X11
from tests.clocks import SetClock
from tests.waiting import wait_until
from tests.worker.desktops import SaidDesktop, message_bus, missing, x_server

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Linux desktop is asked")
needs_bus = pytest.mark.skipif(bool(missing("dbus-daemon")), reason=missing("dbus-daemon"))
needs_x = pytest.mark.skipif(bool(missing("Xvfb", "xdotool")), reason=missing("Xvfb", "xdotool"))


# providers that do not answer


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_provider_that_hangs_is_not_known(released: threading.Event) -> None:
    probe = Probe("display", released.wait)
    probe.begin()
    assert (probe.value(0.01), probe.note) == (None, "display: no answer within 0.01 s")


def test_a_provider_that_hangs_is_asked_once(released: threading.Event) -> None:
    asked = []
    probe = Probe("display", lambda: asked.append(1) or released.wait())
    for _ in range(3):
        probe.begin()
        probe.value(0.01)
    assert asked == [1]


def test_a_provider_that_answers_again_is_known_again(released: threading.Event) -> None:
    probe = Probe("display", released.wait)
    probe.begin()
    probe.value(0.01)
    released.set()
    wait_until(lambda: probe.value(0.01) is True, "it has answered")
    assert probe.note == ""


def test_a_provider_that_fails_says_why() -> None:
    probe = Probe("display", lambda: 1 / 0)
    probe.begin()
    assert (probe.value(), probe.note) == (None, "display: ZeroDivisionError: division by zero")


def test_one_that_hangs_keeps_no_other_from_being_known(released: threading.Event) -> None:
    def hangs() -> bool:
        return released.wait()

    providers = SessionProviders(lambda: 7.0, hangs, lambda: "", hangs, lambda: False)  # type: ignore[arg-type]
    signals = OwnSession(providers).sense()
    assert (signals.idle_s, signals.locked, signals.full_screen, signals.film) == (7.0, None, "", None)
    assert len(signals.notes) == 2


# this machine

BURN = "while True: pass"


@pytest.fixture
def burner() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", BURN])
    yield process.pid
    process.kill()
    process.wait()


def test_load_of_our_own_is_not_that_of_others(burner: int) -> None:
    every, others = OtherCpu(), OtherCpu()
    began = psutil.Process(burner).cpu_times().user, time.monotonic()
    every.since_last(())
    others.since_last([burner])
    time.sleep(0.3)
    with_burner, without = every.since_last(()), others.since_last([burner])
    part = (psutil.Process(burner).cpu_times().user - began[0]) / (time.monotonic() - began[1])
    assert with_burner is not None
    assert without is not None
    assert with_burner - without >= 0.5 * part / (psutil.cpu_count() or 1)


def test_load_of_our_own_that_has_ended_is_not_that_of_others() -> None:
    every, others = OtherCpu(), OtherCpu()
    every.since_last(())
    others.since_last([os.getpid()])
    subprocess.run([sys.executable, "-c", "for _ in range(10**7): pass"], check=True)
    with_it, without = every.since_last(()), others.since_last([os.getpid()])
    assert with_it is not None
    assert without is not None
    assert without < with_it


def test_a_listed_program_is_found_by_its_name(burner: int) -> None:
    name = psutil.Process(burner).name()
    assert first_running([name.upper()]) == name


def test_a_program_that_does_not_run_is_not_found() -> None:
    assert first_running(["no-such-program-runs-here"]) == ""


def test_what_is_ours_is_no_listed_program(burner: int, tmp_path: Path) -> None:
    name = f"ours-{os.getpid()}"
    program = tmp_path / name
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as running:
        try:
            wait_until(lambda: first_running([name]) == name, "the program is seen")
            assert first_running([name], [running.pid]) == ""
        finally:
            running.kill()


@pytest.fixture
def supplies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A laptop's battery and plug, as the kernel shows them."""
    monkeypatch.setattr("psutil._pslinux.POWER_SUPPLY_PATH", str(tmp_path))
    battery, mains = tmp_path / "BAT0", tmp_path / "AC0"
    values = {
        "capacity": "80",
        "status": "Discharging",
        "energy_now": "8",
        "energy_full": "10",
        "power_now": "1",
    }
    for folder, files in (
        (battery, {**values, "type": "Battery"}),
        (mains, {"online": "0", "type": "Mains"}),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    return tmp_path


def test_a_laptop_is_on_battery_until_it_is_plugged_in(supplies: Path) -> None:
    before = on_battery()
    (supplies / "AC0" / "online").write_text("1")
    assert (before, on_battery()) == (True, False)


def test_a_computer_without_a_battery_is_not_on_battery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil._pslinux.POWER_SUPPLY_PATH", str(tmp_path))
    assert on_battery() is False


@pytest.mark.slow
def test_a_computer_whose_cable_was_pulled_is_offline() -> None:
    """In a network namespace of its own, in which there is no cable until one is put in."""
    code = "from swarmkit.worker.sensing.machine import online; print(online())"
    cable = "ip link add cable type dummy && ip link set cable up && ip addr add 192.0.2.1/24 dev cable"
    said = []
    for first in ("true", cable):
        command = ["unshare", "--net", "sh", "-c", f'{first} && exec "$0" -c "$1"', sys.executable, code]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"there can be no network of its own here: {error}")
        said.append(done.stdout.strip())
    assert said == ["False", "True"]


def test_a_gpu_without_a_driver_is_not_known() -> None:
    signals = OwnMachine().sense(SensingOrder((), (), "cuda:99", Path("/")))
    assert signals.gpu is None
    assert any(note.startswith("GPU: ") for note in signals.notes)


# desktops on a bus


@pytest.fixture(scope="module")
def bus() -> Iterator[str]:
    with message_bus() as address:
        yield address


@pytest.fixture
def desktop(bus: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SaidDesktop]:
    for variable in ("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"):
        monkeypatch.setenv(variable, bus)
    said = SaidDesktop(bus)
    yield said
    close_desktop_bus()
    said.close()


WAYLAND = linux.idle_provider(Desktop("wayland"))


@needs_bus
def test_gnome_tells_the_idle_time(desktop: SaidDesktop) -> None:
    desktop.say("mutter", idle_ms=65_000)
    assert WAYLAND() == 65.0


@needs_bus
def test_without_gnome_the_screen_saver_tells_it(desktop: SaidDesktop) -> None:
    desktop.say("saver", idle_ms=5_000)
    assert WAYLAND() == 5.0


@needs_bus
def test_logind_tells_it_only_where_the_desktop_has_told_logind(desktop: SaidDesktop) -> None:
    desktop.say("login", IdleHint=True, IdleSinceHintMonotonic=int((time.monotonic() - 40) * 1e6))
    assert 39 < WAYLAND() < 60
    desktop.say("login", IdleHint=False)
    with pytest.raises(UnknownError, match="has not told logind"):
        WAYLAND()


@needs_bus
def test_where_nobody_answers_it_is_not_known(desktop: SaidDesktop) -> None:
    with pytest.raises(UnknownError, match=r"Mutter.*ScreenSaver.*login1"):
        WAYLAND()


@needs_bus
@pytest.mark.parametrize(("status", "film"), [("Playing", "VLC media player"), ("Paused", "")])
def test_a_player_that_plays_is_a_film(desktop: SaidDesktop, status: str, film: str) -> None:
    desktop.say("player", PlaybackStatus=status)
    assert linux.film() == film


@needs_bus
def test_a_player_that_starts_later_is_a_film_too(desktop: SaidDesktop) -> None:
    assert linux.film() == ""
    desktop.say("player", PlaybackStatus="Playing")
    wait_until(lambda: linux.film() == "VLC media player", "the player is seen", every=0.02)


@needs_bus
@pytest.mark.parametrize(("told", "is_metered"), [(1, True), (3, True), (2, False), (4, False), (0, None)])
def test_the_network_manager_tells_whether_the_connection_is_metered(
    desktop: SaidDesktop, told: int, is_metered: bool | None
) -> None:
    desktop.say("network", Metered=told)
    assert metered() is is_metered


@needs_bus
def test_a_locked_screen_is_seen_by_either_way(desktop: SaidDesktop) -> None:
    desktop.say("login", LockedHint=True)
    by_logind = linux.locked()
    desktop.say("login", LockedHint=False)
    wait_until(lambda: linux.locked() is False, "logind told that it is open", every=0.02)
    desktop.say("saver", active=True)
    wait_until(lambda: linux.locked() is True, "the screen saver is seen", every=0.02)
    desktop.say("saver", active=False)
    assert (by_logind, linux.locked()) == (True, False)


LOCKED = SYSTEM, "org.freedesktop.login1", "/org/freedesktop/login1/session/auto"


@pytest.fixture
def followed(desktop: SaidDesktop) -> Iterator[tuple[SetClock, Callable[[], bool]]]:
    """A clock, and what logind is known to have said of the lock by that clock; it is not locked."""
    desktop.say("login", LockedHint=False)
    clock = SetClock()
    bus = DesktopBus(clock)
    yield clock, lambda: bus.followed_property(*LOCKED, "org.freedesktop.login1.Session", "LockedHint")
    bus.close()


@needs_bus
def test_what_is_told_when_it_changes_is_asked_then(
    desktop: SaidDesktop, followed: tuple[SetClock, Callable[[], bool]]
) -> None:
    _, locked = followed
    before = locked()
    desktop.say("login", LockedHint=True)
    wait_until(locked, "it is known to be locked", every=0.02)
    assert before is False


@needs_bus
def test_what_is_told_when_it_changes_is_asked_again_after_a_time_all_the_same(
    desktop: SaidDesktop, followed: tuple[SetClock, Callable[[], bool]]
) -> None:
    clock, locked = followed
    known = [locked()]
    desktop.services["login"].said["LockedHint"] = True  # and nobody is told
    known.append(locked())
    clock.seconds += TRUSTED_S
    assert [*known, locked()] == [False, False, True]


@needs_bus
def test_a_session_from_afar_is_seen(desktop: SaidDesktop) -> None:
    desktop.say("login", Remote=True)
    assert linux.remote_session() is True


@needs_bus
def test_a_game_under_wayland_is_seen_where_it_asks_for_game_mode(desktop: SaidDesktop) -> None:
    desktop.say("game", ClientCount=1)
    assert linux.providers({"WAYLAND_DISPLAY": "wayland-0"}).full_screen() == "a game"


@needs_bus
def test_a_sleep_waits_until_it_is_allowed(desktop: SaidDesktop) -> None:
    manager = desktop.say("manager")
    told: list[bool] = []
    watch = LogindSleepWatch()
    watch.begin(told.append)
    wait_until(lambda: manager.held, "the sleep is held up")
    os.close(manager.given)
    desktop.signal_sleep(True)
    wait_until(lambda: told == [True], "the sleep was announced")
    with pytest.raises(BlockingIOError):
        os.read(manager.held[0], 1)  # the other end is open
    watch.allow()
    wait_until(lambda: os.read(manager.held[0], 1) == b"", "the sleep goes on")
    watch.end()


@needs_bus
def test_a_bus_that_is_lost_is_found_again(desktop: SaidDesktop, monkeypatch: pytest.MonkeyPatch) -> None:
    with message_bus() as other:
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", other)
        with pytest.raises(UnknownError):
            linux.idle_of_mutter()
    monkeypatch.undo()
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", desktop.address)
    desktop.say("mutter", idle_ms=1000)

    def answers() -> bool:
        try:
            return linux.idle_of_mutter() == 1.0
        except UnknownError:
            return False

    wait_until(answers, "the other bus is asked", every=0.05)


@pytest.mark.parametrize(
    ("environment", "desktop"),
    [
        ({"DISPLAY": ":0"}, Desktop("x11", ":0")),
        ({"DISPLAY": ":0", "WAYLAND_DISPLAY": "wayland-0"}, Desktop("wayland")),
        ({"DISPLAY": ":0", "XDG_SESSION_TYPE": "wayland"}, Desktop("wayland")),
        (
            {"XDG_SESSION_TYPE": "wayland", "XDG_RUNTIME_DIR": "/run/user/7"},
            Desktop("wayland", "/run/user/7/wayland-0"),
        ),
        (
            {"WAYLAND_DISPLAY": "wayland-1", "XDG_RUNTIME_DIR": "/run/user/7"},
            Desktop("wayland", "/run/user/7/wayland-1"),
        ),
        ({"WAYLAND_DISPLAY": "/run/seat", "XDG_RUNTIME_DIR": "/run/user/7"}, Desktop("wayland", "/run/seat")),
        ({"XDG_SESSION_TYPE": "tty"}, Desktop("none")),
    ],
)
def test_under_wayland_the_x_server_is_never_asked(environment: dict[str, str], desktop: Desktop) -> None:
    assert desktop_of(environment) == desktop


# X11


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    with x_server() as name:
        yield name


@needs_x
def test_input_ends_the_idle_time_of_x11(display: str) -> None:
    idle_s = linux.idle_provider(Desktop("x11", display))
    wait_until(lambda: idle_s() > 0.5, "nobody has done anything for half a second", every=0.05)
    subprocess.run(
        ["xdotool", "mousemove_relative", "5", "5"], env={**os.environ, "DISPLAY": display}, check=True
    )
    assert idle_s() < 0.5


FULL_SCREEN = """
import sys
from Xlib import X, Xatom, display
screen = display.Display(sys.argv[1])
root = screen.screen().root
window = root.create_window(0, 0, 320, 200, 0, screen.screen().root_depth)
state = [screen.intern_atom("_NET_WM_STATE_FULLSCREEN")]
window.change_property(screen.intern_atom("_NET_WM_STATE"), Xatom.ATOM, 32, state)
window.map()
root.change_property(screen.intern_atom("_NET_ACTIVE_WINDOW"), Xatom.WINDOW, 32, [window.id])
screen.sync()
print("mapped", flush=True)
sys.stdin.read()
root.change_property(screen.intern_atom("_NET_ACTIVE_WINDOW"), Xatom.WINDOW, 32, [0])
screen.sync()
"""


@needs_x
def test_a_program_that_fills_the_screen_is_seen(display: str) -> None:
    full_screen = linux.providers({"DISPLAY": display}).full_screen
    before = full_screen()
    command = [sys.executable, "-c", FULL_SCREEN, display]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as game:
        assert game.stdout is not None
        game.stdout.readline()
        during = full_screen()
        game.communicate("")
    assert (before, during, full_screen()) == ("", "a program", "")


@needs_x
def test_a_window_that_begins_to_fill_the_screen_is_seen(display: str) -> None:
    """The active window stays the same."""
    from Xlib import Xatom
    from Xlib.display import Display

    screen = Display(display)
    root = screen.screen().root
    window = root.create_window(0, 0, 320, 200, 0, screen.screen().root_depth)
    root.change_property(screen.get_atom("_NET_ACTIVE_WINDOW"), Xatom.WINDOW, 32, [window.id])
    screen.sync()
    full_screen = X11(display, SetClock()).full_screen
    seen = [full_screen()]
    for states in ([screen.get_atom("_NET_WM_STATE_FULLSCREEN")], []):
        window.change_property(screen.get_atom("_NET_WM_STATE"), Xatom.ATOM, 32, states)
        screen.sync()
        seen.append(full_screen())
    screen.close()
    assert seen == ["", "a program", ""]


@needs_x
def test_an_x_server_that_has_gone_is_not_known() -> None:
    with x_server() as name:
        idle_s = linux.idle_provider(Desktop("x11", name))
        idle_s()
    with pytest.raises(UnknownError, match="does not answer"):
        idle_s()


def test_neither_a_mac_nor_windows_is_taken_for_this_one() -> None:
    from swarmkit.worker.sensing import macos, windows

    with pytest.raises(UnknownError):
        windows.remote_session()
    with pytest.raises(UnknownError):
        macos.idle_s()
