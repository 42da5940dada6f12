"""Counts what a server's sessions, its engine and its process hold at one moment."""

from __future__ import annotations

import asyncio
import logging
import threading

import psutil

from swarmkit.net.protocol.messages import Resources
from swarmkit.net.rpc.receive_budget import ReceiveBudget
from swarmkit.server.cache.kv_budget import KVBudget
from swarmkit.server.engine.engine import Engine

logger = logging.getLogger(__name__)


def count_resources(
    sessions: int,
    streams: int,
    pushers: int,
    budget: KVBudget,
    receive_budget: ReceiveBudget,
    engine: Engine,
) -> Resources:
    """Count on the event loop; see `Resources` for the first three."""
    try:
        budget.audit()
        accounted = True
    except AssertionError:
        logger.exception("the cache does not add up")
        accounted = False
    return Resources(
        sessions=sessions,
        streams=streams,
        pushers=pushers,
        leased_bytes=budget.leased_bytes,
        kept_bytes=budget.pages.nbytes,
        capacity_bytes=budget.capacity_bytes,
        receive_budget_bytes=receive_budget.held_bytes,
        works=engine.holds,
        accounted=accounted,
        tasks=len(asyncio.all_tasks()),
        threads=threading.active_count(),
        descriptors=psutil.Process().num_fds(),
    )
