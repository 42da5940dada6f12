"""The device stays below its temperature and its power, in a model of how it warms."""

from __future__ import annotations

import math

import msgspec
import pytest

from swarmkit.worker.governor import LEAST_SHARE, Governor
from swarmkit.worker.policy import Allowance, allowed
from swarmkit.worker.settings import WorkerLimits

AWAY: Allowance = allowed(WorkerLimits(), "away")


def limited(**values: float) -> Allowance:
    return msgspec.structs.replace(AWAY, **values)


def warmed(
    allowance: Allowance, *, room_c: float, full_c: float, warms_in_s: float, minutes: int
) -> list[tuple[float, float]]:
    """Share and temperature each second, of a device that would reach `full_c` at full work."""
    governor, heat, seen = Governor(), room_c, []
    for _ in range(minutes * 60):
        governor = governor.after(1.0, allowance, round(heat))  # sensors tell whole degrees
        aim = room_c + governor.share * (full_c - room_c)
        heat += (aim - heat) * (1 - math.exp(-1 / warms_in_s))
        seen.append((governor.share, heat))
    return seen


@pytest.mark.parametrize("warms_in_s", [15.0, 60.0, 180.0])
@pytest.mark.parametrize("full_c", [80.0, 95.0, 120.0])
def test_the_temperature_stays_below_its_limit(full_c: float, warms_in_s: float) -> None:
    seen = warmed(limited(temperature_c=75.0), room_c=30.0, full_c=full_c, warms_in_s=warms_in_s, minutes=60)
    assert max(heat for _, heat in seen) <= 75.5


@pytest.mark.parametrize("full_c", [95.0, 120.0])
def test_most_of_what_the_limit_allows_is_used(full_c: float) -> None:
    seen = warmed(limited(temperature_c=75.0), room_c=30.0, full_c=full_c, warms_in_s=60.0, minutes=60)
    most = (75.0 - 30.0) / (full_c - 30.0)
    late = [share for share, _ in seen[1800:]]
    assert sum(late) / len(late) > 0.85 * most


def test_a_cool_device_is_not_held_back() -> None:
    seen = warmed(limited(temperature_c=75.0), room_c=25.0, full_c=60.0, warms_in_s=60.0, minutes=30)
    assert {share for share, _ in seen} == {1.0}


def test_without_a_sensor_the_persons_share_holds() -> None:
    assert Governor().after(1.0, limited(compute_share=0.4), None).share == 0.4


def test_the_persons_share_is_never_exceeded() -> None:
    seen = warmed(limited(compute_share=0.3), room_c=20.0, full_c=60.0, warms_in_s=60.0, minutes=10)
    assert max(share for share, _ in seen) == 0.3


def test_a_device_that_stays_too_hot_does_next_to_nothing() -> None:
    governor = Governor()
    for _ in range(60):
        governor = governor.after(1.0, AWAY, 100.0)
    assert governor.share == LEAST_SHARE


def test_the_mean_power_is_kept_where_it_may_not_be_set() -> None:
    governor, used = Governor(), []
    for _ in range(600):
        watts = 40.0 + 260.0 * governor.share
        used.append(watts)
        governor = governor.after(1.0, limited(gpu_watts=150.0), 50.0, watts)
    assert sum(used[60:]) / len(used[60:]) <= 150.0 * 1.05
