"""A server with no more memory than the kernel lets it have: it chooses blocks, and serves a first step.

usage: python -m tests.server.memory_program CHECKPOINT MEMORY_BYTES DTYPE CACHE_TOKENS STEP_TOKENS COMPILE

The limit is on what the process has for itself, code and files apart. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from pathlib import Path

import anyio
import torch

from swarmkit.client.session.chain import ChainSession
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ServerSettings

_SMALL_BYTES = 32 * 2**20


def private_bytes() -> int:
    """What this process has for itself now, as its limit counts it."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


async def serve(checkpoint: Checkpoint, config: ServerConfig) -> dict[str, float]:
    """Have a client of the server run one long step and one token over all that it holds."""
    network = MemoryNetwork()
    node, asking = Node(over_memory(network)), Node(over_memory(network))
    server = node.add(config)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.run)
        low, high = server.blocks
        model = ModelRef("tiny", checkpoint.fingerprint, checkpoint.num_blocks, checkpoint.hidden_size)
        client = SwarmClient(model)
        await tasks.start(asking.run)
        await tasks.start(asking.run_client, client)
        tokens = config.settings.requests.max_step_tokens
        session = ChainSession(client, tokens + 1, low, high)
        await session.step(torch.randn(1, tokens, checkpoint.hidden_size))
        await session.step(torch.randn(1, 1, checkpoint.hidden_size))
        session.close()
        tasks.cancel_scope.cancel()
    assert config.memory_bytes is not None
    plan = config.plan(config.memory_bytes)
    kv_bytes = config.plan(config.memory_bytes, with_slots=False).kv_bytes_per_block
    # Room for the slots of compiled steps is kept free, until there are compiled steps.
    of_blocks = (high - low) * (plan.block_bytes + plan.kv_bytes_per_block - kv_bytes)
    return {
        "blocks": high - low,
        "used": (plan.workspace_bytes + of_blocks + server.limits.cache_bytes) / config.memory_bytes,
        "cache_share": server.limits.cache_bytes / ((high - low) * kv_bytes),
        "private_bytes": private_bytes(),
    }


def main(
    path: str, memory_bytes: int, dtype: str, cache_tokens: int, max_step_tokens: int, compiles: str
) -> None:
    """Limit the memory, and serve within it."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    settings = ServerSettings().replace(
        cache_tokens=cache_tokens,
        max_step_tokens=max_step_tokens,
        activation_cache_bytes=_SMALL_BYTES,
        throughput=1.0,
        compile=compiles,
    )
    checkpoint = Checkpoint.open(path)
    config = ServerConfig(
        checkpoint, num_blocks="auto", memory_bytes=memory_bytes, dtype=dtype, settings=settings
    )
    print(json.dumps(asyncio.run(serve(checkpoint, config))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
