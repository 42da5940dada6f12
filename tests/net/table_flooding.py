"""A flood of well-signed records over one peer that keeps records for others, and what it costs that peer."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarmkit.net.hivemind.table import sealed_record
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.registry import records
from swarmkit.net.registry.envelope import MAX_RECORD_BYTES
from swarmkit.net.transport.identity import Identity

from .announcements import announcement

ROOT = Path(__file__).parents[2]
BLOCKS = 400
"""Of each model: a record of its own stands in the table for each."""
FILLER = ("/ip4/192.0.2.1/tcp/1/" + "x" * 212,) * 15
AT_ONCE = 500
"""Records of one request, which then has about 2 MiB."""
_REQUEST_TIMEOUT_S = 60.0

Record = tuple[str, bytes]
"""Key, and signed value of about 3.7 KB."""


def large_records(number: int, identity: Identity, expires_at: float) -> list[Record]:
    """So many records, each under a key of its own."""
    made = []
    for index in range(number):
        model, block = divmod(index, BLOCKS)
        said = announcement(
            peer_id=identity.peer_id,
            fingerprint=f"{model:032x}",
            num_blocks=BLOCKS,
            start=block,
            stop=block + 1,
            addresses=FILLER,
            expires_at=expires_at,
        )
        value = records.sign(said, identity)
        assert 3_500 < len(value) <= MAX_RECORD_BYTES
        made.append((records.block_key(said.fingerprint, block), value))
    return made


async def store_at_once(
    stranger: HivemindTransport, identity: Identity, made: Sequence[Record], expires_at: float
) -> int:
    """Have every peer that is known store records of `identity`, in requests as large as they take.

    Returns: how many times a record was taken.
    """
    node = stranger.table.node
    key_id = importlib.import_module("hivemind.dht.routing").DHTID.generate
    dumps = importlib.import_module("hivemind.utils.serializer").MSGPackSerializer.dumps
    node.protocol.wait_timeout = _REQUEST_TIMEOUT_S
    taken = 0
    for first in range(0, len(made), AT_ONCE):
        part = made[first : first + AT_ONCE]
        values = [dumps(sealed_record(identity, key, value, expires_at)) for key, value in part]
        for peer in list(node.protocol.routing_table.peer_id_to_uid):
            stored = await node.protocol.call_store(
                peer,
                [key_id(key) for key, _ in part],
                values,
                expires_at,
                subkeys=[identity.peer_id] * len(part),
            )
            taken += sum(stored or ())
    return taken


async def _flood(addresses: Sequence[str], number: int) -> int:
    stranger = await HivemindTransport.create(initial_peers=addresses)
    try:
        expires_at = time.time() + 600
        made = large_records(number, stranger.identity, expires_at)
        return await store_at_once(stranger, stranger.identity, made, expires_at)
    finally:
        await stranger.close()


def measure(number: int) -> dict[str, Any]:
    """Flood a peer in a process of its own with so many records.

    Returns: how many records it took, and what it tells of itself; see `table_keeper`.
    """
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
        taken = asyncio.run(_flood(addresses, number))
        out, _ = keeper.communicate(timeout=60)
    finally:
        keeper.kill()
        keeper.wait()
    return {"records": number, "taken": taken, **json.loads(out)}
