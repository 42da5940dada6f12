"""What a flood of well-signed records costs the peer that is to keep them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.registry import records

from .announcements import announcement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
MODELS = 4
BLOCKS = 400
"""Of each model: a record of its own stands in the table for each."""
FILLER = ("/ip4/192.0.2.1/tcp/1/" + "x" * 220,) * 15
AT_ONCE = 200


def _signed(stranger: HivemindTransport, model: int, block: int, expires_at: float) -> bytes:
    said = announcement(
        peer_id=stranger.peer_id,
        fingerprint=f"{model:032x}",
        num_blocks=BLOCKS,
        start=block,
        stop=block + 1,
        addresses=FILLER,
        expires_at=expires_at,
    )
    value = records.sign(said, stranger.identity)
    assert 3_500 < len(value) <= 4096
    return value


async def flood(addresses: list[str]) -> int:
    """Store 1,600 records of about 3.7 KB as a stranger; returns how many of them were taken at first."""
    stranger = await HivemindTransport.create(initial_peers=addresses, table_timeout=60.0)
    stored = 0
    try:
        for model in range(MODELS):
            expires_at = time.time() + 600
            pairs = [
                (records.block_key(f"{model:032x}", block), _signed(stranger, model, block, expires_at))
                for block in range(BLOCKS)
            ]
            for first in range(0, BLOCKS, AT_ONCE):
                stored += await stranger.store(pairs[first : first + AT_ONCE], expires_at)
    finally:
        await stranger.close()
    return stored


def test_a_flood_of_records_costs_a_peer_little_memory_and_no_long_turn() -> None:
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.net.table_keeper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert keeper.stdout is not None
        addresses = json.loads(keeper.stdout.readline())
        stored = asyncio.run(flood(addresses))
        out, _ = keeper.communicate(timeout=60)
    finally:
        keeper.kill()
        keeper.wait()
    figures = json.loads(out)
    print(figures)
    assert stored > MODELS * BLOCKS / 10
    assert figures["memory_bytes"] < 48 * 2**20  # of which the table may have 16 MiB
    assert figures["longest_turn_s"] < 0.25
