"""What the tray shows in each state of the worker."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from swarmkit_app.tray.face import SEPARATOR, MenuItem, count, face_of, news, shape_of

from swarmkit.worker.control.values import NodeStatus, Status, Totals
from swarmkit.worker.pause import Pause
from swarmkit.worker.policy import Presence, allowed
from swarmkit.worker.settings import WorkerLimits

SERVING = Status(
    state="serving",
    reason="serving",
    words="Ready: nobody uses it at present",
    until=None,
    presence="away",
    pause=None,
    allowance=allowed(WorkerLimits(), "away"),
    model="tiny-chat",
    node=NodeStatus(pid=7, blocks=(0, 8)),
    lease=None,
    today=Totals(tokens=1234, sessions=1),
    all=Totals(tokens=3_400_000, sessions=120),
    month_bytes=1_500_000_000,
    disk_bytes=0,
    troubles=(),
    notes=(),
    restarts=0,
    retry_at=None,
    pid=6,
    version="1",
)


def status(**changes: Any) -> Status:
    return msgspec.structs.replace(SERVING, **changes)


def labels(shown: Status | None) -> list[str]:
    return [item.label for item in face_of(shown).menu]


def actions(items: tuple[MenuItem, ...]) -> list[str]:
    return [item.action for item in items if item.action] + [
        action for item in items for action in actions(item.items)
    ]


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, "serving"),
        ({"state": "starting"}, "serving"),
        ({"state": "working"}, "working"),
        ({"state": "paused"}, "paused"),
        ({"state": "stopping"}, "paused"),
        ({"state": "trouble"}, "trouble"),
        ({"troubles": ("The disk is full.",)}, "trouble"),
    ],
)
def test_each_state_has_its_icon(changes: dict[str, Any], shape: str) -> None:
    assert shape_of(status(**changes)) == shape


def test_the_first_line_says_why() -> None:
    shown = status(state="paused", reason="battery", words="Paused: on battery", node=None)
    first = face_of(shown).menu[0]
    assert (first.label, first.is_enabled) == ("Paused: on battery", False)


def test_the_menu_tells_what_is_served_and_what_was_given() -> None:
    node = NodeStatus(pid=7, blocks=(0, 8), sessions=2, tokens_per_s=14.24)
    assert labels(status(state="working", node=node))[1:4] == [
        "tiny-chat, blocks 0:8, 2 sessions, 14.2 tokens/s",
        "Today 1.2 thousand tokens for 1 session; in all 3.4 million tokens for 120 sessions",
        "1.5 GB of 50.0 GB used this month",
    ]


@pytest.mark.parametrize(
    ("presence", "heading", "cores"),
    [("away", "While you are away:", "all"), ("in use", "While you use the computer:", "1")],
)
def test_the_menu_tells_the_limits_that_hold(presence: Presence, heading: str, cores: str) -> None:
    shown = status(presence=presence, allowance=allowed(WorkerLimits(), presence))
    (limits,) = (item for item in face_of(shown).menu if item.label == "Limits that hold now")
    lines = [item.label for item in limits.items]
    assert lines[:2] == [heading, f"Processor cores: {cores}"]
    assert {"Upload: 625.0 kB/s", "Disk for weights: 20.0 GiB"} <= set(lines)


def test_a_limit_that_is_not_set_has_no_line() -> None:
    (limits,) = (item for item in face_of(SERVING).menu if item.label == "Limits that hold now")
    assert not any(item.label.startswith(("Power", "Download")) for item in limits.items)


def test_a_pause_can_be_ended_and_not_begun_again() -> None:
    paused = status(state="paused", reason="asked", pause=Pause(until="resumed"), node=None)
    found = actions(face_of(paused).menu)
    assert "resume" in found
    assert not any(action.startswith("pause") for action in found)


def test_a_worker_that_serves_can_be_paused_in_six_ways() -> None:
    found = [action for action in actions(face_of(SERVING).menu) if action.startswith("pause")]
    assert found == [
        "pause 900", "pause 3600", "pause tomorrow", "pause away", "pause resumed", "pause now",
    ]  # fmt: skip


def test_nothing_can_be_paused_before_the_person_has_chosen() -> None:
    found = actions(face_of(status(state="paused", reason="not_agreed", node=None)).menu)
    assert found == ["wizard", "dashboard", "settings", "log", "quit", "settings"]


def test_a_worker_that_does_not_answer_can_be_started() -> None:
    face = face_of(None)
    assert (face.shape, face.click, actions(face.menu)) == ("trouble", "start", ["start", "log", "quit"])


@pytest.mark.parametrize(
    "shown",
    [SERVING, status(reason="not_agreed"), status(pause=Pause(until="away")), None],
    ids=["serving", "new", "paused", "absent"],
)
def test_the_menu_has_ten_lines_at_most(shown: Status | None) -> None:
    assert len([item for item in face_of(shown).menu if item != SEPARATOR]) <= 10


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (SERVING, status(state="paused"), ""),
        (SERVING, status(troubles=("The disk is full.",)), "The disk is full."),
        (status(troubles=("The disk is full.",)), status(troubles=("The disk is full.",)), ""),
        (SERVING, status(state="trouble", words="Trouble: the node ends"), "Trouble: the node ends"),
        (SERVING, None, "The worker has ended by itself."),
        (None, None, ""),
    ],
)
def test_only_new_trouble_is_told(before: Status | None, after: Status | None, told: str) -> None:
    assert news(before, after) == told


@pytest.mark.parametrize(
    ("number", "shown"), [(950, "950"), (12_345, "12 thousand"), (3.4e6, "3.4 million"), (2e9, "2.0 billion")]
)
def test_numbers_are_for_people(number: float, shown: str) -> None:
    assert count(number) == shown
