"""A moving mean, and how far from it what is measured is."""

from __future__ import annotations

_GAIN_DEVIATION = 0.25


class Ewma:
    """A mean and its mean deviation, both moving, as TCP learns its round trips (RFC 6298)."""

    def __init__(self, first: float, deviation: float, gain: float) -> None:
        """Args: deviation: what it is taken for at first. gain: the weight of a new value in the mean."""
        self.mean = first
        self.deviation = deviation
        self._gain = gain

    def observe(self, value: float) -> None:
        """Take in a new value."""
        self.deviation += _GAIN_DEVIATION * (abs(value - self.mean) - self.deviation)
        self.mean += self._gain * (value - self.mean)
