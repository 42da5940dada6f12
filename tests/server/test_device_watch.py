"""A host that hands work to a device ahead of time learns how long it took, and waits for little."""

from __future__ import annotations

import torch

from swarmkit.server.engine.device_watch import DeviceWatch
from swarmkit.server.engine.work import LearnedTimes


class Device:
    """Does what it is given, one after the other, as its clock goes on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0
        self.waits = 0

    def give(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def mark(self) -> Passed:
        return Passed(self)


class Passed:
    """A mark on such a device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = 0.0

    def record(self) -> None:
        self.at = max(self.device.busy_until, self.device.now)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.waits += not self.query()
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end_event: Passed) -> float:
        return (end_event.at - self.at) * 1e3


def watched(most: int = 2) -> tuple[Device, DeviceWatch[str], list[tuple[str, float]]]:
    device = Device()
    learnt: list[tuple[str, float]] = []
    return (
        device,
        DeviceWatch(device.mark, lambda what, seconds: learnt.append((what, seconds)), most),
        learnt,
    )


def run(device: Device, watch: DeviceWatch[str], what: str, seconds: float) -> None:
    begun = watch.begin()
    device.give(seconds)
    watch.end(begun, what)


def test_two_pieces_are_handed_over_without_a_wait() -> None:
    device, watch, _ = watched()
    run(device, watch, "a", 1.0)
    run(device, watch, "b", 2.0)
    assert (device.waits, device.now) == (0, 0.0)


def test_a_third_waits_for_the_first_and_no_longer() -> None:
    device, watch, _ = watched()
    for name in ("a", "b", "c"):
        run(device, watch, name, 1.0)
    assert (device.waits, device.now) == (1, 1.0)


def test_nothing_is_learnt_of_what_still_runs() -> None:
    device, watch, learnt = watched()
    run(device, watch, "a", 1.0)
    watch.catch_up()
    assert learnt == []


def test_each_piece_took_what_it_took_on_the_device() -> None:
    device, watch, learnt = watched()
    run(device, watch, "a", 1.0)
    run(device, watch, "b", 2.0)
    device.now = 5.0
    watch.catch_up()
    assert learnt == [("a", 1.0), ("b", 2.0)]


def test_a_piece_that_failed_is_not_told_of() -> None:
    device, watch, learnt = watched()
    watch.begin()
    device.give(1.0)
    run(device, watch, "b", 2.0)
    device.now = 5.0
    watch.catch_up()
    assert learnt == [("b", 2.0)]


def test_on_a_cpu_all_is_known_at_once() -> None:
    now = iter((1.0, 3.5))
    learned = LearnedTimes(torch.device("cpu"), lambda: next(now))
    learned.begin_pass()
    learned.end_pass(8)
    learned.learn(decodes=True)
    assert learned.times.of(8) == 2.5
