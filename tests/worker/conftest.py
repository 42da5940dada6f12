"""A worker in this process, with a machine that does what the test says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swarmkit.worker.places import WorkerPlaces
from tests.worker.worlds import RunningWorker, SaidMachine


@pytest.fixture
def places(tmp_path: Path) -> WorkerPlaces:
    return WorkerPlaces.inside(tmp_path)


@pytest.fixture
def machine() -> SaidMachine:
    return SaidMachine()


@pytest.fixture
def start(places: WorkerPlaces, machine: SaidMachine) -> Iterator[Callable[..., RunningWorker]]:
    """Start a worker of `places`; it is ended after the test."""
    started: list[RunningWorker] = []

    def begin(**options: object) -> RunningWorker:
        started.append(RunningWorker(places, machine, **options))
        return started[-1]

    yield begin
    for worker in started:
        worker.close()


@pytest.fixture
def worker(start: Callable[..., RunningWorker]) -> RunningWorker:
    return start()


@pytest.fixture
def over_loopback(start: Callable[..., RunningWorker]) -> RunningWorker:
    return start(loopback=True)


assert sys.platform != "win32"
