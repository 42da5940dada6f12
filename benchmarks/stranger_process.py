"""Strangers in a process of their own, so that a benchmark's other peers do not share a processor's time with
them more than machines in a swarm would.

    python -m benchmarks.stranger_process '{"join": ["/ip4/…"], "manners": {"silent": 25, "mute": 25}}'

There is one peer for each manner, with as many servers as are asked for. It writes "ready" when all of them
are announced, and leaves when its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net.connect import over_hivemind
from tests.strangers import STRANGE, Stranger

MODEL = "tiny-chat"
_LEAVE_S = 60.0


@contextmanager
def strangers(join: Sequence[str], manners: Mapping[str, int]) -> Iterator[None]:
    """Have strangers in a swarm inside the `with` block.

    Args:
        join: addresses of peers of the swarm.
        manners: names of `STRANGE`, and how many servers of each.
    """
    task = json.dumps({"join": list(join), "manners": dict(manners)})
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.stranger_process", task],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the strangers did not come; see what their process has written")
        yield
        process.stdin.close()
        process.wait(_LEAVE_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def _live(join: Sequence[str], manners: Mapping[str, int]) -> None:
    checkpoint = Checkpoint.open(MODEL)
    factory = over_hivemind(join)
    crowd = [
        Stranger(factory, checkpoint, STRANGE[name], services=servers, name=name.split()[0])
        for name, servers in manners.items()
    ]
    for stranger in crowd:
        await stranger.begin()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for stranger in crowd:
        await stranger.end()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(_live(**json.loads(sys.argv[1])))
