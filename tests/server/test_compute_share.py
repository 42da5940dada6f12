"""A device that may compute for a share of the time rests for the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swarmkit.server.engine.worker import ThreadWorker

from ..waiting import wait_until


class Jumping:
    """A clock that a turn moves on, and a rest too."""

    def __init__(self) -> None:
        self.at = 0.0
        self.rested: list[float] = []

    def now(self) -> float:
        return self.at

    def time(self) -> float:
        return self.at

    def rest(self, seconds: float) -> bool:
        self.rested.append(seconds)
        self.at += seconds
        return False


@pytest.fixture
def clock() -> Jumping:
    return Jumping()


@pytest.fixture
def worker(clock: Jumping) -> Iterator[ThreadWorker]:
    worker = ThreadWorker("share", clock, clock.rest)
    turns = iter([0.0] * 5 + [None] * 1000)

    def turn() -> float | None:
        clock.at += 0.1
        return next(turns)

    worker.start(turn, lambda: None)
    yield worker
    worker.stop()
    worker.join()


@pytest.mark.parametrize(("share", "rest_s"), [(0.5, 0.1), (0.25, 0.3), (0.1, 0.9)])
def test_it_rests_after_each_turn(worker: ThreadWorker, clock: Jumping, share: float, rest_s: float) -> None:
    worker.compute_share = share
    worker.ring()
    wait_until(lambda: len(clock.rested) == 5, "five turns were taken")
    assert clock.rested == [pytest.approx(rest_s)] * 5


def test_it_rests_also_where_each_turn_waits_for_its_client(worker: ThreadWorker, clock: Jumping) -> None:
    worker.compute_share = 0.5
    worker.ring()
    wait_until(lambda: len(clock.rested) == 5, "there is no more to do")
    worker.ring()
    wait_until(lambda: len(clock.rested) == 6, "the work that came at once had to wait")
    assert clock.rested[-1] == pytest.approx(0.1)


def test_waiting_for_work_is_rest(worker: ThreadWorker, clock: Jumping) -> None:
    worker.compute_share = 0.5
    worker.ring()
    wait_until(lambda: clock.at > 1.05, "there is no more to do")
    clock.at += 10.0
    before = clock.at
    worker.ring()
    wait_until(lambda: clock.at > before, "another turn was taken")
    assert len(clock.rested) == 5


def test_it_never_rests_where_it_may_compute_all_the_time(worker: ThreadWorker, clock: Jumping) -> None:
    worker.ring()
    wait_until(lambda: clock.at > 0.55, "all turns were taken")
    assert clock.rested == []
