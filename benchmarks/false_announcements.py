"""How soon does a new client have a route beside ten thousand false announcements of its model?

    python -m benchmarks.false_announcements --json > benchmarks/results/false-announcements-tiny-chat.json

Two servers of tiny-chat run. A stranger makes announcements of all blocks by so many peers that do not exist,
signed by their keys, and stores them at every peer that it reaches. Over p2p daemons on loopback, all peers
check and bound what they keep. The in-memory network keeps all records, and hands all of them to the client,
which checks them.

Reported, as medians over new clients:

    usual_s     seconds from the first look-up to a route, without false announcements
    route_s     the same, beside them
    plan_ms     the part of it that is the search for a route among those that were read
    known       servers that the client knows then
    honest      how many of the two servers it knows then
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio

from swarmkit import LocalSwarm
from swarmkit.bench.environment import environment
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.local.swarm import over_memory
from swarmkit.net import portal
from swarmkit.net.connect import TransportFactory, joined, over_hivemind
from swarmkit.net.hivemind.table import load_hivemind, sealed_record
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.registry import records
from swarmkit.net.registry.records import Announcement
from swarmkit.net.transport.identity import Identity
from tests.strangers import false_announcements, plant

MODEL = "tiny-chat"
_AT_ONCE = 1000
"""Records in one request; a peer takes 1,024."""
_REQUEST_TIMEOUT_S = 60.0


async def route_times(reach: TransportFactory, model: ModelRef, honest: set[str]) -> dict[str, float]:
    """What one new client takes to its first route."""
    async with joined(reach, Identity()) as (transport, registry), anyio.create_task_group() as tasks:
        client = SwarmClient(model)
        began = time.perf_counter()
        await tasks.start(partial(client.run, transport=transport, registry=registry))
        looked = time.perf_counter()
        client.routes.plan(0, model.num_blocks)
        ended = time.perf_counter()
        known = client.known.servers()
        client.request_stop()
    return {
        "route_s": ended - began,
        "plan_ms": (ended - looked) * 1e3,
        "known": len(known),
        "honest": len(honest & {server.peer_id for server in known}),
    }


async def flood(addresses: Sequence[str], made: list[tuple[Identity, Announcement]]) -> None:
    """Store announcements at the peers of a swarm, in the largest requests that these take."""
    stranger = await HivemindTransport.create(initial_peers=addresses)
    try:
        node = stranger.table.node
        dumps = importlib.import_module("hivemind.utils.serializer").MSGPackSerializer.dumps
        key_id = importlib.import_module("hivemind.dht.routing").DHTID.generate
        node.protocol.wait_timeout = _REQUEST_TIMEOUT_S
        peers = list(node.protocol.routing_table.peer_id_to_uid)
        signed = [(who, word.expires_at, records.sign(word, who)) for who, word in made]
        for key in records.keys_of(made[0][1]):
            for first in range(0, len(signed), _AT_ONCE):
                part = signed[first : first + _AT_ONCE]
                values = [dumps(sealed_record(who, key, value, until)) for who, until, value in part]
                for peer in peers:
                    await node.protocol.call_store(
                        peer,
                        [key_id(key)] * len(part),
                        values,
                        [until for _, until, _ in part],
                        subkeys=[who.peer_id for who, _, _ in part],
                    )
    finally:
        await stranger.close()


def measure(
    swarm: LocalSwarm,
    reach: TransportFactory,
    store: Callable[[list[tuple[Identity, Announcement]]], Any],
    announcements: int,
    clients: int,
) -> dict[str, Any]:
    """The times of so many clients before and after a flood."""
    checkpoint = swarm.checkpoint
    model = ModelRef(MODEL, checkpoint.fingerprint, checkpoint.num_blocks, checkpoint.hidden_size)
    honest = {server.peer_id for server in swarm.servers}
    with portal.lease() as lease:
        run = partial(lease.call, route_times, reach, model, honest)
        before = [run() for _ in range(clients)]
        made = false_announcements(announcements, checkpoint)
        lease.call(store, made)
        after = [run() for _ in range(clients)]

    def median(rows: list[dict[str, float]], name: str) -> float:
        return round(statistics.median(row[name] for row in rows), 4)

    found = {name: median(after, name) for name in ("route_s", "plan_ms", "known", "honest")}
    return {"announcements": announcements, "usual_s": median(before, "route_s"), **found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--announcements", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    given = parser.parse_args()
    rows = []
    with LocalSwarm(MODEL, 1, 2, processes=True) as swarm:
        load_hivemind()
        reach = over_hivemind(swarm.initial_peers, client_mode=True)
        store = partial(flood, swarm.initial_peers)
        found = measure(swarm, reach, store, given.announcements, given.clients)
        rows.append({"network": "p2p daemons", **found})
        print(rows[-1], file=sys.stderr)
    with LocalSwarm(MODEL, 1, 2, transport="memory") as swarm:
        assert swarm.network is not None
        store = partial(plant, swarm.network)
        found = measure(swarm, over_memory(swarm.network), store, given.announcements, given.clients)
        rows.append({"network": "in memory", **found})
        print(rows[-1], file=sys.stderr)
    if given.json:
        command = "python -m benchmarks.false_announcements " + " ".join(sys.argv[1:])
        result = {**environment(), "command": command, "benchmark": "false announcements", "rows": rows}
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
