"""A peer that keeps records for others, as a process that tells what this costs it.

It prints its addresses, and at the end of its standard input what it has used since then, each as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
import time

import psutil

from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.registry.acceptance import acceptable_now


class LongestTurn:
    """Measures the processor time of the longest turn of an event loop, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def watch(self) -> None:
        for _ in itertools.count():  # until it is cancelled
            began = time.thread_time()
            await asyncio.sleep(0.001)
            self.seconds = max(self.seconds, time.thread_time() - began)


async def main() -> None:
    peer = await HivemindTransport.create(record_check=acceptable_now)
    process, turn = psutil.Process(), LongestTurn()
    await peer.fetch(["swarmkit/1/models"])
    print(json.dumps(list(peer.addresses)), flush=True)
    memory, used = process.memory_info().rss, sum(process.cpu_times()[:2])
    gc.freeze()  # as `swarmkit serve` does
    watching = asyncio.create_task(turn.watch())
    await asyncio.to_thread(sys.stdin.read)
    watching.cancel()
    storage = peer.table.storage
    figures = {
        "table_records": storage.records,
        "table_bytes": storage.nbytes,
        "memory_bytes": process.memory_info().rss - memory,
        "processor_s": sum(process.cpu_times()[:2]) - used,
        "longest_turn_s": turn.seconds,
    }
    print(json.dumps(figures), flush=True)
    await peer.close()


if __name__ == "__main__":
    asyncio.run(main())
