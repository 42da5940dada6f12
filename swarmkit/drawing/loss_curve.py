"""The losses of a training that may be long, in a bounded number of points."""

from __future__ import annotations

from itertools import chain


class LossCurve:
    """Keeps at most `2 · most` points, each the mean of equally many losses that followed each other."""

    def __init__(self, most: int = 400) -> None:
        self._most = most
        self._points: list[float] = []
        self._per_point = 1
        self._open: list[float] = []
        self.count = 0
        self.last: float | None = None

    def add(self, loss: float) -> None:
        """Take the loss of the next step."""
        self.count += 1
        self.last = loss
        self._open.append(loss)
        if len(self._open) == self._per_point:
            self._points.append(_mean(self._open))
            self._open.clear()
        if len(self._points) == 2 * self._most:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_mean(pair) for pair in pairs]
            self._per_point *= 2

    def points(self) -> tuple[float, ...]:
        """The points, oldest first; the last one may be the mean of fewer losses."""
        rest = [_mean(self._open)] if self._open else []
        return tuple(chain(self._points, rest))


def _mean(losses: list[float] | tuple[float, float]) -> float:
    return sum(losses) / len(losses)
