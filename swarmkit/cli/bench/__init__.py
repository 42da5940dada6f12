"""`swarmkit bench`: measure, as ratios within one run. A file per command, with its table for people."""

from __future__ import annotations

from swarmkit.cli.bench.common import bench_app

__all__ = ["bench_app"]

# Importing a command's file adds it to `bench_app`; the order is the order in `--help`.
# isort: off
from swarmkit.cli.bench import decode, clients, prefill, interference, distance, faults, failover  # noqa: F401
from swarmkit.cli.bench import second_turn, codecs, footprint, weights, soak, train, recovery  # noqa: F401
