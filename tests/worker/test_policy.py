"""May the worker serve, and what does the person read? One row per situation."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.worker.pause import Pause, PauseRequest
from swarmkit.worker.policy import Decision, Reason, Situation, decide
from swarmkit.worker.settings import WorkerSettings, changed
from swarmkit.worker.signals import GpuSignals, MachineSignals, SessionSignals
from tests.worker.worlds import AWAY, CALM, HERE

NOON = datetime(2026, 11, 28, 12, 0, tzinfo=timezone.utc)  # a Saturday
AGREED = changed(WorkerSettings(), {"agreed": True, "serve": {"model": "tiny-chat"}})
HEADLESS = changed(AGREED, {"rules": {"presence": "headless"}})
ALSO_IN_USE = changed(AGREED, {"rules": {"only_when_away": False}})


def decided(
    settings: WorkerSettings = AGREED,
    session: SessionSignals | None = AWAY,
    *,
    pause: Pause | None = None,
    before: Reason | None = None,
    now: datetime = NOON,
    **machine: Any,
) -> Decision:
    signals = msgspec.structs.replace(CALM, **machine)
    return decide(Situation(now=now, machine=signals, session=session, pause=pause, before=before), settings)


def with_session(**signals: Any) -> SessionSignals:
    return msgspec.structs.replace(AWAY, **signals)


def gpu(**signals: Any) -> GpuSignals:
    calm = GpuSignals(other_programs=(), other_load=0.0, temperature_c=40.0)
    return msgspec.structs.replace(calm, **signals)


def schedule(**days: str) -> WorkerSettings:
    return changed(AGREED, {"rules": {"schedule": days}})


NIGHT = "#" * 7 + "." * 15 + "##"
PAUSED = {
    "nothing chosen": (decided(WorkerSettings()), "Paused: you have not chosen yet to lend this computer"),
    "no model": (decided(changed(AGREED, {"serve": {"model": ""}})), "Paused: no model has been chosen yet"),
    "asked to": (decided(pause=Pause(until="resumed")), "Paused: until you resume"),
    "asked to, for a while": (
        decided(pause=Pause(until="seconds", ends_at=(NOON + timedelta(hours=1)).timestamp())),
        "Paused: until 13:00",
    ),
    "asked to, until tomorrow": (
        decided(pause=Pause(until="tomorrow", ends_at=(NOON + timedelta(hours=18)).timestamp())),
        "Paused: until 06:00 tomorrow",
    ),
    "asked to, until away": (
        decided(pause=Pause(until="away")),
        "Paused: until you have been away for 30 minutes",
    ),
    "the lid is closed": (decided(going_to_sleep=True), "Paused: the computer goes to sleep"),
    "on battery": (decided(on_battery=True), "Paused: on battery"),
    "metered": (decided(metered=True), "Paused: the connection is metered"),
    "the quota": (
        decided(month_bytes=50 * 10**9),
        "Paused: this month's 50.0 GB are used up; goes on on 1 December",
    ),
    "the schedule": (decided(schedule(saturday=NIGHT)), "Paused: by your schedule, until 22:00"),
    "no tray": (decided(session=None), "Paused: the tray does not run, which tells when you are away"),
    "somebody far away": (
        decided(session=with_session(remote_session=True)),
        "Paused: somebody is here over the network",
    ),
    "a listed program": (decided(program="blender"), "Paused: blender runs"),
    "a game": (decided(session=with_session(full_screen="doom")), "Paused: doom fills the screen"),
    "a film": (decided(session=with_session(film="VLC")), "Paused: VLC plays"),
    "the person": (
        decided(session=with_session(idle_s=125.0)),
        "Paused: you use the computer (2 of 5 min)",
    ),
    "who knows": (
        decided(session=with_session(idle_s=None)),
        "Paused: it cannot be told whether you are away",
    ),
    "another program on the GPU": (
        decided(gpu=gpu(other_programs=("blender",))),
        "Paused: blender uses the GPU",
    ),
    "busy processors": (decided(other_cpu=0.6), "Paused: other programs use 60% of the processors"),
    "a busy GPU": (decided(gpu=gpu(other_load=0.5)), "Paused: other programs use 50% of the GPU"),
    "heat": (
        decided(gpu=gpu(temperature_c=83.0)),
        "Paused: the device has 83 °C, and cools down",
    ),
    "a full disk": (decided(disk_free_bytes=10**9), "Paused: only 1.0 GB of the disk are free"),
    "no network": (
        decided(changed(AGREED, {"serve": {"join": ["/ip4/192.0.2.7/tcp/1/p2p/x"]}}), online=False),
        "Paused: there is no network",
    ),
}


@pytest.mark.parametrize(("decision", "words"), PAUSED.values(), ids=PAUSED)
def test_it_pauses_and_says_why(decision: Decision, words: str) -> None:
    assert (decision.serves, decision.words) == (False, words)


def test_every_reason_has_its_row() -> None:
    assert {decision.reason for decision, _ in PAUSED.values()} == set(Reason) - {Reason.SERVING}


SERVED = {
    "nobody is here": decided(),
    "a locked screen, just left": decided(session=with_session(idle_s=3.0, locked=True)),
    "in use, where that is allowed": decided(ALSO_IN_USE, HERE),
    "headless, without a tray": decided(HEADLESS, None),
    "on battery, where that is allowed": decided(
        changed(AGREED, {"rules": {"on_battery": True}}), on_battery=True
    ),
    "metered, where that is allowed": decided(changed(AGREED, {"rules": {"on_metered": True}}), metered=True),
    "a film, where that is allowed": decided(
        changed(AGREED, {"rules": {"pause_for_film": False}}), with_session(film="VLC")
    ),
    "in the hours of the schedule": decided(schedule(saturday="." * 12 + "#" + "." * 11)),
    "a little load": decided(other_cpu=0.2, gpu=gpu(other_load=0.05)),
    "nothing known of the machine": decided(
        on_battery=None, metered=None, online=None, other_cpu=None, program=None
    ),
    "no sign of a film or a game, because nobody can tell": decided(
        session=with_session(film=None, full_screen=None, remote_session=None)
    ),
    "no network, and a swarm of its own": decided(online=False),
}


@pytest.mark.parametrize("decision", SERVED.values(), ids=SERVED)
def test_it_serves(decision: Decision) -> None:
    assert (decision.serves, decision.reason) == (True, Reason.SERVING)


# limits


@pytest.mark.parametrize(
    ("session", "cores"),
    [(AWAY, None), (HERE, 1), (with_session(idle_s=None), 1), (None, 1)],
    ids=["away", "in use", "not known", "no tray"],
)
def test_only_somebody_who_is_known_to_be_away_leaves_the_higher_limits(
    session: SessionSignals | None, cores: int | None
) -> None:
    assert decided(ALSO_IN_USE, session).allowance.cpu_cores == cores


def test_headless_machines_always_have_the_limits_for_away() -> None:
    assert decided(HEADLESS, None).allowance.cpu_cores is None


def test_a_load_that_is_let_in_away_is_too_much_in_use() -> None:
    assert decided(ALSO_IN_USE, AWAY, other_cpu=0.4).serves
    assert not decided(ALSO_IN_USE, HERE, other_cpu=0.4).serves


# when it changes


def test_the_return_of_the_person_stops_it_promptly() -> None:
    assert decided(session=HERE).haste == "prompt"


def test_the_end_of_the_schedules_hours_lets_sessions_move_away() -> None:
    assert decided(schedule(saturday="." * 24)).haste == "polite"


def test_it_says_when_the_person_counts_as_away() -> None:
    until = decided(session=with_session(idle_s=100.0)).until
    assert until == (NOON + timedelta(seconds=200)).timestamp()


def test_a_schedule_without_hours_never_ends() -> None:
    decision = decided(schedule(**{day: "." * 24 for day in AGREED.rules.schedule}))
    assert (decision.serves, decision.until) == (False, None)


def test_the_schedule_finds_the_next_week() -> None:
    only_friday = {day: "." * 24 for day in AGREED.rules.schedule} | {"friday": "." * 23 + "#"}
    assert decided(schedule(**only_friday)).words == "Paused: by your schedule, until Friday 23:00"


@pytest.mark.parametrize(("before", "serves"), [(None, True), (Reason.BUSY_CPU, False)])
def test_a_load_just_below_the_limit_ends_no_pause(before: Reason | None, serves: bool) -> None:
    assert decided(other_cpu=0.45, before=before).serves is serves


@pytest.mark.parametrize(("before", "serves"), [(None, True), (Reason.TOO_HOT, False)])
def test_a_hot_device_cools_down_before_it_goes_on(before: Reason | None, serves: bool) -> None:
    assert decided(gpu=gpu(temperature_c=73.0), before=before).serves is serves


# pauses


@pytest.mark.parametrize(
    ("pause", "seconds", "away_s", "over"),
    [
        (PauseRequest(until="seconds", seconds=3600.0), 3599.0, 1e6, False),
        (PauseRequest(until="seconds", seconds=3600.0), 3600.0, 0.0, True),
        (PauseRequest(until="seconds"), 3600.0, 0.0, True),
        (PauseRequest(until="tomorrow"), 17 * 3600.0, 1e6, False),
        (PauseRequest(until="tomorrow"), 19 * 3600.0, 0.0, True),
        (PauseRequest(until="away"), 1e6, 1799.0, False),
        (PauseRequest(until="away"), 1e6, None, False),
        (PauseRequest(until="away"), 0.0, 1800.0, True),
        (PauseRequest(until="resumed"), 1e6, 1e6, False),
    ],
)
def test_pauses_end_when_they_should(
    pause: PauseRequest, seconds: float, away_s: float | None, over: bool
) -> None:
    begun = Pause.begin(pause, NOON)
    assert begun.is_over(NOON.timestamp() + seconds, away_s) is over


@pytest.mark.parametrize("seconds", [-86400.0, 86400.0])
def test_a_pause_keeps_its_length_when_the_clock_is_set(seconds: float) -> None:
    begun = Pause.begin(PauseRequest(until="seconds", seconds=3600.0), NOON)
    set_ = begun.after_clock_was_set(seconds)
    at = NOON.timestamp() + seconds
    assert (set_.is_over(at + 3599, None), set_.is_over(at + 3601, None)) == (False, True)


# whatever is sensed


MAYBE = st.none() | st.booleans()


@given(
    session=st.none()
    | st.builds(
        SessionSignals,
        idle_s=st.none() | st.floats(0, 299),
        locked=st.just(False) | st.none(),
        full_screen=st.none() | st.just("") | st.just("game"),
        film=st.none() | st.just("") | st.just("film"),
        remote_session=MAYBE,
    ),
    machine=st.builds(
        MachineSignals,
        on_battery=MAYBE,
        metered=MAYBE,
        online=MAYBE,
        going_to_sleep=st.booleans(),
        other_cpu=st.none() | st.floats(0, 1),
        program=st.none() | st.just("") | st.just("listed"),
    ),
)
def test_it_never_serves_while_somebody_may_be_here(
    session: SessionSignals | None, machine: MachineSignals
) -> None:
    """Unless the person allows it, nothing but a known absence or a locked screen makes it serve."""
    assert not decide(Situation(now=NOON, machine=machine, session=session), AGREED).serves


def test_every_refusal_has_a_sentence_of_one_line() -> None:
    for session, battery, metered in product((None, AWAY, HERE), (None, True), (None, True)):
        words = decided(session=session, on_battery=battery, metered=metered).words
        assert words
        assert "\n" not in words
