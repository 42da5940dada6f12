"""What a Wayland compositor tells of the person's absence, and what is made of one that tells nonsense."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit.worker.sensing import linux
from swarmkit.worker.sensing.dbus import close_desktop_bus
from swarmkit.worker.sensing.probes import UnknownError
from swarmkit.worker.sensing.session_kind import Desktop
from swarmkit.worker.sensing.wayland import QUIET_S, WaylandIdle
from tests.clocks import SetClock
from tests.waiting import wait_until
from tests.worker.compositor import NOTIFIER, SEAT, FakeInput, SaidCompositor, event, kwin, text
from tests.worker.desktops import missing


@pytest.fixture
def compositor(tmp_path: Path) -> Iterator[SaidCompositor]:
    said = SaidCompositor(tmp_path / "wayland-0")
    yield said
    said.close()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def idle(compositor: SaidCompositor, clock: SetClock) -> Iterator[WaylandIdle]:
    idle = WaylandIdle(str(compositor.path), clock)
    yield idle
    idle.close()


def becomes(idle: WaylandIdle, seconds: float) -> None:
    wait_until(lambda: idle.idle_s() == seconds, f"it is {seconds:g} s")


def test_somebody_is_here_until_the_compositor_tells_otherwise(idle: WaylandIdle, clock: SetClock) -> None:
    first = idle.idle_s()
    clock.seconds += 1000.0
    assert (first, idle.idle_s()) == (0.0, 0.0)


def test_an_absence_counts_from_when_it_is_told(
    compositor: SaidCompositor, idle: WaylandIdle, clock: SetClock
) -> None:
    idle.idle_s()
    compositor.say(is_idle=True)
    becomes(idle, QUIET_S)
    clock.seconds += 300.0
    assert idle.idle_s() == QUIET_S + 300.0


def test_the_first_touch_ends_an_absence(
    compositor: SaidCompositor, idle: WaylandIdle, clock: SetClock
) -> None:
    idle.idle_s()
    compositor.say(is_idle=True)
    becomes(idle, QUIET_S)
    compositor.say(is_idle=False)
    becomes(idle, 0.0)


def test_it_is_asked_for_the_time_that_is_counted(compositor: SaidCompositor, idle: WaylandIdle) -> None:
    idle.idle_s()
    assert list(compositor.asked.values()) == [(1, int(QUIET_S * 1e3))]


def test_input_alone_counts_where_the_compositor_can_tell(tmp_path: Path) -> None:
    newer = SaidCompositor(tmp_path / "newer", {"wl_compositor": 6, SEAT: 9, NOTIFIER: 3})
    idle = WaylandIdle(str(newer.path))
    idle.idle_s()
    asked = [opcode for opcode, _ in newer.asked.values()]
    idle.close()
    newer.close()
    assert asked == [2]


@pytest.mark.parametrize("interfaces", [{SEAT: 7}, {NOTIFIER: 1}, {}], ids=["no notifier", "no seat", "none"])
def test_a_compositor_that_cannot_tell_is_not_known(tmp_path: Path, interfaces: dict[str, int]) -> None:
    older = SaidCompositor(tmp_path / "older", interfaces)
    with pytest.raises(UnknownError, match="ext-idle-notify-v1"):
        WaylandIdle(str(older.path)).idle_s()
    older.close()


NONSENSE = {
    "a message without a head's length": struct.pack("=IHH", 1, 0, 4),
    "an odd length": struct.pack("=IHH", 1, 0, 9) + bytes(8),
    "an error": event(1, 0, struct.pack("=II", 1, 1) + text("invalid object")),
    "an error that is cut off": event(1, 0, bytes(4)),
    "a long message of nobody, and noise": struct.pack("=IHH", 9, 0, 0xFFFC) + bytes(0xFFF4) + b"\xff" * 99,
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_not_known_and_a_new_connection_is_tried(
    compositor: SaidCompositor, idle: WaylandIdle, nonsense: bytes
) -> None:
    idle.idle_s()
    compositor.send(nonsense)

    def fails() -> bool:
        try:
            idle.idle_s()
        except UnknownError:
            return True
        return False

    wait_until(fails, "the nonsense is noticed")
    assert idle.idle_s() == 0.0


def test_a_compositor_that_ends_is_not_known_until_it_is_back(
    compositor: SaidCompositor, idle: WaylandIdle
) -> None:
    idle.idle_s()
    compositor.hang_up()
    with pytest.raises(UnknownError, match=r"has ended|does not answer"):
        wait_until(lambda: idle.idle_s() != 0.0, "the end is noticed")
    assert idle.idle_s() == 0.0


def test_without_a_compositor_the_other_ways_are_asked_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"):
        monkeypatch.setenv(variable, f"unix:path={tmp_path / 'no bus'}")
    idle_s = linux.idle_provider(Desktop("wayland", str(tmp_path / "nobody")))
    with pytest.raises(UnknownError, match=r"session bus.*compositor does not answer.*system bus"):
        idle_s()
    close_desktop_bus()


@pytest.mark.slow
@pytest.mark.skipif(bool(missing("kwin_wayland")), reason=missing("kwin_wayland"))
def test_kwin_tells_of_an_absence_and_of_its_end(tmp_path: Path) -> None:
    """A whole KWin, on a screen that nobody sees, and a hand that moves its pointer."""
    with kwin(tmp_path) as path:
        idle = WaylandIdle(path)
        hand = FakeInput(path)
        hand.move()
        assert idle.idle_s() == 0.0
        wait_until(lambda: idle.idle_s() >= QUIET_S, "nobody has touched anything", every=0.2)
        hand.move()
        wait_until(lambda: idle.idle_s() == 0.0, "the pointer has moved", every=0.05)
        hand.close()
        idle.close()
