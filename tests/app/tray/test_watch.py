"""What the tray senses reaches the worker before it is needed there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from swarmkit_app.tray.watch import WorkerWatch, wants_signals

from swarmkit.worker.signals import SessionSignals
from tests.waiting import wait_until
from tests.worker.worlds import AWAY, HERE, RunningWorker

PAUSED = {"event": "worker_state_changed", "state": "paused", "reason": "in_use", "words": "Paused"}
STARTING = {"event": "worker_state_changed", "state": "starting", "reason": "starting", "words": "Starting"}


class SaidSession:
    """Senses what the test says."""

    signals = AWAY

    def sense(self) -> SessionSignals:
        return self.signals


@pytest.fixture
def session() -> SaidSession:
    return SaidSession()


@pytest.fixture
def watch(
    worker: RunningWorker, session: SaidSession, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WorkerWatch]:
    """It follows a worker that is paused, and whose leases last for an hour while nothing is lent."""
    monkeypatch.setattr("swarmkit.worker.worker.IDLE_LEASE_S", 3600.0)
    worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
    worker.client.pause()
    watch = WorkerWatch(worker.client, session, lambda status: None)
    watch.start()
    worker.wait_until(lambda status: status.lease and status.lease.seconds > 1800.0, "it has a long lease")
    yield watch
    watch.stop()


def test_a_node_that_is_to_start_has_the_tray_tell_at_once(
    worker: RunningWorker, session: SaidSession, watch: WorkerWatch
) -> None:
    session.signals = HERE
    worker.client.resume()
    worker.wait_until(lambda status: status.reason == "in_use", "the worker knows that somebody is here")


def test_while_a_node_runs_the_tray_goes_on_telling(
    worker: RunningWorker, session: SaidSession, watch: WorkerWatch
) -> None:
    worker.client.resume()
    worker.wait_for("working")
    session.signals = HERE
    assert worker.wait_for("paused").reason == "in_use"


def test_a_tray_that_ends_gives_its_lease_back(worker: RunningWorker, watch: WorkerWatch) -> None:
    watch.stop()
    wait_until(lambda: worker.status().lease is None, "the lease has ended", every=0.05)


@pytest.mark.parametrize(
    ("event", "before", "wants"),
    [
        (STARTING, PAUSED, True),
        ({"state": "paused", "reason": "no_tray"}, PAUSED, True),
        ({"event": "status", "status": PAUSED}, {}, True),
        ({**STARTING, "words": "Starting: half of it is loaded"}, STARTING, False),
        (PAUSED, STARTING, False),
        ({"state": "working", "reason": "serving"}, STARTING, False),
        ({"event": "worker_settings_changed"}, PAUSED, False),
    ],
)
def test_the_worker_is_told_at_once_only_where_it_waits_for_it(
    event: dict[str, Any], before: dict[str, Any], wants: bool
) -> None:
    assert wants_signals(event, before) is wants
