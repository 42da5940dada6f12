"""How far virtual peers are from each other: clusters, a graph of a network, or measured round trips."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swarmkit.errors import UsageError


@dataclass(frozen=True)
class Distances:
    """Where peers can be, and how long a message takes from one place to another.

    Attributes:
        one_way_s: [places, places], seconds.
        bytes_per_s: [places, places].
    """

    one_way_s: np.ndarray
    bytes_per_s: np.ndarray

    @property
    def places(self) -> int:
        return len(self.one_way_s)

    def seconds(self, one: int, other: int, nbytes: float = 0.0) -> float:
        """Of a message from one place to another."""
        return float(self.one_way_s[one, other] + nbytes / self.bytes_per_s[one, other])


def clusters(
    sizes: Sequence[int],
    *,
    inside_rtt_s: float = 0.005,
    between_rtt_s: float = 0.1,
    inside_bps: float = 1e9,
    between_bps: float = 1e8,
) -> Distances:
    """Clusters of so many places each: near each other inside, far from the other clusters' places."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    same = of[:, None] == of[None, :]
    return Distances(
        np.where(same, inside_rtt_s, between_rtt_s) / 2, np.where(same, inside_bps, between_bps) / 8
    )


def scattered(count: int, chance: random.Random, *, far_s: float = 0.06, bps: float = 1e8) -> Distances:
    """Places on a disc whose diameter takes `far_s` seconds one way; the same bandwidth everywhere."""
    angles = np.array([chance.uniform(0, 2 * math.pi) for _ in range(count)])
    radii = np.sqrt(np.array([chance.random() for _ in range(count)])) / 2
    at = radii * np.exp(1j * angles)
    return Distances(0.002 + far_s * np.abs(at[:, None] - at[None, :]), np.full((count, count), bps / 8))


def read_topology(path: Path, count: int | None = None, chance: random.Random | None = None) -> Distances:
    """Places from a file: a `.graph` of the Topology Zoo's networks, or a table of measured round trips.

    A graph has the sections `NODES` and `EDGES` (source, destination, weight, bandwidth in kbit/s, delay in
    µs); messages take its shortest paths. A table (CSV) has latitudes, longitudes and round trips in ms from
    some vantage points: two peers are as far from each other as their round trips from these differ, and as
    light in glass takes.

    Args:
        count: so many places of a table are drawn; None = all.

    Raises:
        UsageError: it is neither, or malformed.
    """
    try:
        text = path.read_text()
        return _from_graph(text) if text.startswith("NODES") else _from_table(text, count, chance)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UsageError(f"{path} is not a topology that can be read: {error}") from error


def _from_graph(text: str) -> Distances:
    lines = iter(text.splitlines())
    nodes = int(next(lines).split()[1])
    seconds = np.full((nodes, nodes), np.inf)
    bits = np.full((nodes, nodes), 1e9)
    np.fill_diagonal(seconds, 0.0)
    for line in lines:
        words = line.split()
        if len(words) == 6 and words[0].startswith("edge"):
            one, other, delay_us = int(words[1]), int(words[2]), float(words[5])
            seconds[one, other] = seconds[other, one] = min(seconds[one, other], delay_us * 1e-6)
    for middle in range(nodes):  # Floyd and Warshall
        seconds = np.minimum(seconds, seconds[:, middle, None] + seconds[None, middle, :])
    if not np.isfinite(seconds).all():
        raise ValueError("some of its nodes are not connected")
    return Distances(seconds, bits / 8)


_LIGHT_KM_PER_S = 200_000.0
_DETOUR = 1.5
"""Cables are so many times as long as the way of a bird."""


def _from_table(text: str, count: int | None, chance: random.Random | None) -> Distances:
    rows = list(csv.DictReader(text.splitlines()))
    if count is not None:
        rows = (chance or random.Random(0)).sample(rows, min(count, len(rows)))
    names = [name for name in rows[0] if name.startswith("rtt_ms")]
    where = np.radians([[float(row["latitude"]), float(row["longitude"])] for row in rows])
    trips = np.array([[float(row[name] or "nan") for name in names] for row in rows]) * 1e-3
    last_mile = np.nanmin(trips, axis=1) / 4
    lat, lon = where[:, 0], where[:, 1]
    half = np.sin((lat[:, None] - lat) / 2) ** 2
    half = half + np.cos(lat)[:, None] * np.cos(lat) * np.sin((lon[:, None] - lon) / 2) ** 2
    km = 2 * 6371 * np.arcsin(np.sqrt(np.clip(half, 0, 1)))
    seconds = km * _DETOUR / _LIGHT_KM_PER_S + (last_mile[:, None] + last_mile[None, :]) / 2
    np.fill_diagonal(seconds, 0.0005)
    return Distances(seconds, np.full(seconds.shape, np.inf))  # the table has no bandwidths
