"""Two servers in simulated time: many clients together, and beside long prompts."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from swarmkit.server.engine import scheduler
from swarmkit.server.engine.scheduler import (
    ArrivalPredictor,
    PassLimits,
    PassTimes,
    Schedule,
    ServedBefore,
    WaitingStep,
    next_schedule,
)
from swarmkit.settings import ServerSettings

LIMITS = PassLimits(chunk_tokens=512, decode_slowdown=ServerSettings().engine.decode_slowdown)
PREFILL = -1
SECONDS = 20.0
AWAY_S = 0.010
SENDING_S = 0.0005
"""Outputs leave a server one after the other."""
NOISE = 0.15
"""Everything takes up to so much longer."""

# Seconds of a forward pass over so many tokens, as measured on a CPU; they are lines between these points.
MEASURED_MS = {
    "float32": {1: 20, 2: 38, 4: 35, 8: 42, 16: 57, 32: 95, 64: 170, 128: 320, 512: 1250},
    "bfloat16": {1: 15, 2: 15, 4: 16, 8: 20, 16: 26, 32: 41, 64: 75, 128: 140, 512: 560},
}
SLOW_MS = {1: 48, 2: 100, 4: 105, 8: 115, 16: 160, 32: 240, 64: 400, 128: 700, 512: 2700}
"""A chunk takes longer than anybody is taken to be away."""


def seconds_for(tokens: int, dtype: str) -> float:
    points = sorted(MEASURED_MS[dtype].items())
    for (low, low_ms), (high, high_ms) in itertools.pairwise(points):
        if tokens <= high:
            return (low_ms + (high_ms - low_ms) * (tokens - low) / (high - low)) / 1e3
    return points[-1][1] / 1e3 * tokens / points[-1][0]


@dataclass
class Device:
    """One server's device; a prompt without an end may be waiting there."""

    waiting: dict[int, float] = field(default_factory=dict)
    """Who has a decode step here, and since when."""
    times: PassTimes = field(default_factory=PassTimes)
    decoders: ArrivalPredictor = field(default_factory=ArrivalPredictor)
    busy: bool = False
    prefilled: int = 0
    passed_over: int = 0

    def next_schedule(self, now: float, prefill: bool) -> Schedule | None:
        steps = [
            WaitingStep(who, ServedBefore(), 1, 1, True, now - since, 0)
            for who, since in self.waiting.items()
        ]
        if prefill:
            steps.append(WaitingStep(PREFILL, ServedBefore(), 1, 10_000, False, 0.0, self.passed_over))
        return next_schedule(steps, [], self.decoders.expected(now, self.waiting), self.times, LIMITS)


class Swarm:
    """Clients whose tokens go through two servers, for some simulated seconds."""

    def __init__(self, dtype: str, clients: int, *, prefill: bool, away_s: float = AWAY_S) -> None:
        """Args: away_s: between a client's output and its next token."""
        self.dtype = dtype
        self.away_s = away_s
        self.prefill = prefill
        self.devices = [Device(), Device()]
        self.latencies: list[float] = []
        self._under_way: dict[int, tuple[int, float]] = {}  # the stage, and when the token began
        self._last_sent = [0.0, 0.0]
        self._random = random.Random(0)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        for client in range(clients):
            self._later(self._random.random(), partial(self._token, client))
        for device in self.devices:
            self._later(0.0, partial(self._look, device))
        while self._events[0][0] < SECONDS:
            now, _, event = heapq.heappop(self._events)
            event(now)

    def p99(self) -> float:
        return sorted(self.latencies[20:])[int(0.99 * len(self.latencies[20:]))]

    def _later(self, at: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), event))

    def _noisy(self, seconds: float) -> float:
        return seconds * (1 + NOISE * self._random.random())

    def _token(self, client: int, now: float) -> None:
        self._arrive(client, 0, now, now)

    def _arrive(self, client: int, stage: int, began: float, now: float) -> None:
        self.devices[stage].waiting[client] = now
        self._under_way[client] = stage, began
        self._look(self.devices[stage], now)

    def _look(self, device: Device, now: float) -> None:
        turn = None if device.busy else device.next_schedule(now, self.prefill)
        if turn is None:
            return
        if not turn.steps:
            self._later(now + 0.002, partial(self._look, device))
            return
        device.busy = True
        came = {
            scheduled.key: device.waiting.pop(scheduled.key)
            for scheduled in turn.steps
            if scheduled.key != PREFILL
        }
        prefilled = sum(scheduled.tokens for scheduled in turn.steps if scheduled.key == PREFILL)
        device.passed_over = 0 if prefilled else device.passed_over + 1
        tokens = prefilled + len(came)
        took = self._noisy(seconds_for(tokens, self.dtype))

        def done(then: float) -> None:
            device.busy = False
            device.prefilled += prefilled
            device.times.learn(tokens, took)
            for client, since in came.items():
                device.decoders.decoded(client, 1, since, then)
                self._go_on(client, then)
            self._look(device, then)

        self._later(now + took, done)

    def _go_on(self, client: int, now: float) -> None:
        stage, began = self._under_way[client]
        sent = self._last_sent[stage] = max(now, self._last_sent[stage]) + SENDING_S
        if stage == 0:
            self._later(sent, partial(self._arrive, client, 1, began))
        else:
            self.latencies.append(sent - began)
            self._later(sent + self._noisy(self.away_s), partial(self._token, client))


@pytest.mark.parametrize(("dtype", "gain"), [("float32", 4.0), ("bfloat16", 6.5)])
def test_eight_clients_are_served_many_times_as_fast_as_one(dtype: str, gain: float) -> None:
    one, eight = (Swarm(dtype, clients, prefill=False) for clients in (1, 8))
    assert len(eight.latencies) >= gain * len(one.latencies)


@pytest.mark.parametrize("dtype", MEASURED_MS)
@pytest.mark.parametrize("clients", [1, 2, 4, 8, 16])
def test_waiting_for_each_other_does_not_delay_clients(
    dtype: str, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Swarm(dtype, clients, prefill=False)
    monkeypatch.setattr(scheduler, "worth_waiting", lambda *args: False)
    assert waiting.p99() <= 1.1 * Swarm(dtype, clients, prefill=False).p99()


@pytest.mark.parametrize("dtype", MEASURED_MS)
@pytest.mark.parametrize("clients", [1, 4, 8])
def test_beside_long_prompts_decoding_takes_twice_as_long_at_most(dtype: str, clients: int) -> None:
    alone, beside = Swarm(dtype, clients, prefill=False), Swarm(dtype, clients, prefill=True)
    assert beside.p99() <= 2 * alone.p99()


def test_who_comes_amid_prompts_is_no_longer_held_up_than_who_was_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MEASURED_MS, "slow", SLOW_MS)
    alone, beside = Swarm("slow", 1, prefill=False), Swarm("slow", 1, prefill=True)
    least = SLOW_MS[4] / SLOW_MS[1]  # so much longer a step takes with any of a prompt beside it
    assert beside.p99() <= (1 + NOISE) * least * alone.p99()


@pytest.mark.parametrize("dtype", MEASURED_MS)
@pytest.mark.parametrize("clients", [1, 4, 8])
def test_beside_those_who_decode_prompts_go_on(dtype: str, clients: int) -> None:
    beside = Swarm(dtype, clients, prefill=True)
    tokens_per_s = min(device.prefilled for device in beside.devices) / SECONDS
    assert tokens_per_s >= 1 / seconds_for(1, dtype)  # as fast as a single client decodes


@pytest.mark.parametrize("dtype", MEASURED_MS)
def test_when_nobody_decodes_prompts_have_the_device_to_themselves(dtype: str) -> None:
    alone = Swarm(dtype, 0, prefill=True)
    tokens_per_s = min(device.prefilled for device in alone.devices) / SECONDS
    assert tokens_per_s >= 0.85 * 512 / seconds_for(512, dtype)


@pytest.mark.parametrize("away_s", [0.1, 0.3])
def test_while_a_token_is_far_away_a_prompt_goes_on_half_as_fast_as_alone(away_s: float) -> None:
    beside = Swarm("float32", 1, prefill=True, away_s=away_s)
    tokens_per_s = min(device.prefilled for device in beside.devices) / SECONDS
    assert tokens_per_s >= 0.45 * 512 / seconds_for(512, "float32")
