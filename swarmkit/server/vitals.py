"""How fast a run of blocks is, and whether it answers: measured when it begins, and again while it serves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import anyio

from swarmkit.clock import Clock
from swarmkit.ewma import Ewma
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.throughput import measure_decode_rate, measure_forward_rate
from swarmkit.server.probe import ProbeError, probe
from swarmkit.server.serving import Serving
from swarmkit.server.sessions.link_times import LinkTimes
from swarmkit.settings import NodeSettings

logger = logging.getLogger(__name__)

_GAIN = 0.3


class Vitals:
    """What a server knows of its own speed, for its announcements.

    While clients use it, it learns from their steps, under the load that they make. While nobody does, it
    measures itself now and then. A speed that its owner has set is announced as it is.
    """

    def __init__(
        self,
        serving: Serving,
        fingerprint: str,
        settings: NodeSettings,
        ways: LinkTimes,
        clock: Clock,
        *,
        compute_share: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """Args:
        ways: round trips to next servers.
        compute_share: tells for which share of the time the device may compute.
        """
        self._serving = serving
        self._fingerprint = fingerprint
        self._settings = settings
        self._ways = ways
        self._clock = clock
        self._compute_share = compute_share
        self._other_pace = anyio.Event()
        self._engine: Engine = serving.engine
        self._seconds: Ewma | None = None
        """Of a decode step."""
        self._forward_rate = 0.0
        self._measured_at = clock.now()
        self._steps = 0
        self._heard_at = clock.now()
        """When a step was answered last."""
        self.answers = True
        """Whether it has answered a token when it was asked last."""

    @property
    def rate(self) -> float:
        """Decode steps (tokens) per second through all blocks, with the time in which the device rests."""
        if self._settings.throughput is not None:
            return self._settings.throughput
        return self._compute_share() / self._seconds.mean if self._seconds is not None else 0.0

    async def measure(self) -> None:
        """Measure both rates, unless they are set."""
        is_other_pace = self._other_pace.is_set()
        if is_other_pace:
            self._other_pace = anyio.Event()
        if self._settings.throughput is not None:
            return
        stage = self._serving.stage
        rate = await measure_decode_rate(stage, self._engine)
        forward_rate = await measure_forward_rate(stage, self._engine)
        if is_other_pace:
            self._seconds = None  # what was measured before counts no more
        self._note(1.0 / rate, forward_rate)

    def pace_changed(self) -> None:
        """Measure anew soon: the device computes with another number of threads."""
        self._other_pace.set()

    async def probe(self) -> None:
        """Have it answer one token.

        Raises:
            ProbeError: it does not.
        """
        steps = self._serving.sessions.steps
        await probe(self._serving, self._fingerprint, self._clock)
        self._serving.sessions.steps -= self._serving.sessions.steps > steps  # it counts those of clients
        self._heard_at = self._clock.now()

    def news(self) -> dict[str, Any]:
        """Fields of the next `Announcement`."""
        self._learn()
        share = self._compute_share()
        return {
            "state": "online" if self.answers else "leaving",
            "throughput": self.rate,
            "forward_rate": self._forward_rate * share,
            "measured_age_s": self._clock.now() - self._measured_at,
            "expected_wait_s": min(self._engine.ahead(1, 1).wait_s / share, 3600.0),
            "links": self._ways.latest,
        }

    async def watch(self) -> None:
        """Measure again, and ask for a token again, while no client does; until cancelled."""
        every_s = self._settings.measure_period_s
        while True:
            with anyio.move_on_after(every_s):
                await self._other_pace.wait()
            if self._other_pace.is_set():
                await self.measure()
            self._learn()
            now = self._clock.now()
            if now - self._heard_at >= every_s:
                await self._ask_again()
            if self.answers and now - self._measured_at >= every_s:
                await self.measure()

    async def _ask_again(self) -> None:
        try:
            await self.probe()
        except ProbeError as error:
            if self.answers:
                logger.warning("this server is announced no more until it answers again: %s", error)
            self.answers = False
        else:
            self.answers = True

    def _learn(self) -> None:
        """Take in how long the steps of clients took since the last look."""
        steps = self._serving.sessions.steps
        if steps == self._steps:
            return
        self._steps = steps
        self._heard_at = self._clock.now()
        single_s, forward_rate = self._engine.learned_of(self._serving.stage).times.measured()
        if single_s is not None:
            self._note(single_s, forward_rate)

    def _note(self, seconds: float, forward_rate: float) -> None:
        if self._seconds is None:
            self._seconds = Ewma(seconds, seconds / 2, _GAIN)
        else:
            self._seconds.observe(seconds)
        self._forward_rate = max(forward_rate, 1.0 / seconds)
        self._measured_at = self._clock.now()
