"""How much of the time the device may compute, so that it stays below a temperature and a power. Pure."""

from __future__ import annotations

import math

from msgspec import Struct

from swarmkit.worker.policy import Allowance

LEAST_SHARE = 0.02
_MARGIN_C = 2.0
"""The governor aims so far below the limit: heat goes on rising for a while after work has become less."""
_PER_DEGREE_S = 0.004
"""How fast the share changes, per second, for each degree between the temperature and the aim."""
_SLOPE_OVER_S = 8.0
_SLOPE_S = 20.0
"""The temperature counts as what it will be in so many seconds if it goes on as it does."""


class Governor(Struct, frozen=True):
    """The share of time that is left to the device, and what it was computed from.

    Attributes:
        share: the smallest of the person's share, `heat_share` and `power_share`.
    """

    share: float = 1.0
    heat_share: float = 1.0
    power_share: float = 1.0
    temperature_c: float | None = None
    degrees_per_s: float = 0.0

    def after(
        self, seconds: float, allowance: Allowance, temperature_c: float | None, watts: float | None = None
    ) -> Governor:
        """Return the governor after so many seconds, with what was measured now; None: it is not known.

        `heat_share` moves by ∫(aim − expected temperature), and is halved above the limit. `power_share` is
        multiplied by √(limit ÷ power).
        """
        most = allowance.compute_share
        slope = self._slope(seconds, temperature_c)
        heat = self._heat_share(seconds, allowance.temperature_c, temperature_c, slope)
        power = 1.0
        if watts is not None and allowance.gpu_watts is not None:
            power = _bounded(self.power_share * math.sqrt(allowance.gpu_watts / max(watts, 1.0)))
        return Governor(_bounded(min(most, heat, power)), heat, power, temperature_c, slope)

    def _slope(self, seconds: float, heat_c: float | None) -> float:
        """A moving mean, because sensors tell whole degrees."""
        if heat_c is None or self.temperature_c is None or seconds <= 0:
            return 0.0
        latest = (heat_c - self.temperature_c) / seconds
        return self.degrees_per_s + (latest - self.degrees_per_s) * min(1.0, seconds / _SLOPE_OVER_S)

    def _heat_share(self, seconds: float, limit_c: float, heat_c: float | None, slope: float) -> float:
        if heat_c is None:
            return 1.0
        expected = heat_c + _SLOPE_S * slope
        error = limit_c - _MARGIN_C - max(heat_c, expected)
        share = self.heat_share + _PER_DEGREE_S * error * seconds
        return _bounded(share / 2 if heat_c >= limit_c else share)


def _bounded(share: float) -> float:
    return max(LEAST_SHARE, min(1.0, share))
