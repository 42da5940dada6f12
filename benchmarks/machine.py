"""What the machine itself does, beside which the other results are to be read.

    python benchmarks/machine.py        prints one line of JSON
    python benchmarks/run.py machine    writes it to benchmarks/results/machine.json

Goals in milliseconds were set on one machine, and ratios have bounds of their own: many clients cannot be
served faster than the processor's matrix product gains by more rows, nor two servers work as fast as one
each where two busy processors slow each other down. So these are measured:

* a loop in Python, nanoseconds a turn;
* a linear layer of M (1024 to 2816) with 1, 8 and 32 rows, its weights not in the cache, one thread;
* a product of 128 rows by that layer, billions of operations a second: alone, and in two processes at once;
* 16 kB there and back over a bare hivemind stream between two processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional

from swarmkit.bench.environment import environment

_TURNS = 5_000_000
_WIDTH, _INNER = 1024, 2816
_COLD_BYTES = 2**28
_ECHO_BYTES, _ECHOES = 16 * 1024, 300
_DTYPES = (torch.float32, torch.bfloat16)


def main() -> int:
    """Measure all of it and print it."""
    torch.set_num_threads(1)
    result = {
        "benchmark": "machine",
        **environment(),
        "command": "python benchmarks/machine.py",
        "python_ns_per_turn": round(_python_ns(), 1),
        "linear": {str(dtype).removeprefix("torch."): _linear(dtype) for dtype in _DTYPES},
        "product": _product(),
        "hivemind_echo_16k_ms": round(_echo_ms(), 3),
    }
    print(json.dumps(result))
    return 0


def _python_ns() -> float:
    total, began = 0, time.perf_counter()
    for turn in range(_TURNS):
        total += turn
    return (time.perf_counter() - began) / _TURNS * 1e9


def _linear(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds by the number of rows, and how many times as long as one row more of them take."""
    count = _COLD_BYTES // (_WIDTH * _INNER * dtype.itemsize)
    weights = [torch.randn(_INNER, _WIDTH).to(dtype) for _ in range(count)]
    found = {}
    for rows in (1, 8, 32):
        given = torch.randn(rows, _WIDTH).to(dtype)
        found[f"rows_{rows}_ms"] = round(_median_ms(given, weights), 3)
    for rows in (8, 32):
        found[f"rows_{rows}_to_1"] = round(found[f"rows_{rows}_ms"] / found["rows_1_ms"], 2)
    return found


@torch.inference_mode()
def _median_ms(given: torch.Tensor, weights: Iterable[torch.Tensor]) -> float:
    times = []
    for weight in [*weights] * 3:
        began = time.perf_counter()
        functional.linear(given, weight)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def _product() -> dict[str, float]:
    alone = [_in_processes(1)[0] for _ in range(3)]
    at_once = [value for _ in range(3) for value in _in_processes(2)]
    one, two = statistics.median(alone), statistics.median(at_once)
    return {
        "gflops_alone": round(one, 1),
        "gflops_each_of_two": round(two, 1),
        "slowdown": round(one / two, 3),
    }


def _in_processes(count: int) -> list[float]:
    """What so many processes reach that work at the same time."""
    at = str(time.time() + 8.0)
    command = [sys.executable, __file__, "--product-at", at]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [float(process.communicate()[0]) for process in running]


@torch.inference_mode()
def _product_at(at: float) -> float:
    torch.set_num_threads(1)
    given, weight = torch.randn(128, _WIDTH), torch.randn(_INNER, _WIDTH)
    functional.linear(given, weight)
    while time.time() < at:
        time.sleep(0.01)
    turns = 300
    began = time.perf_counter()
    for _ in range(turns):
        functional.linear(given, weight)
    return 2 * 128 * _WIDTH * _INNER * turns / (time.perf_counter() - began) / 1e9


def _echo_ms() -> float:
    """Through hivemind's own streams and two of its daemons, as it comes."""
    command = [sys.executable, __file__, "--echo"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            return asyncio.run(_ask_for_echoes(server.stdout.readline().strip()))
        finally:
            server.communicate("\n")


async def _serve_echoes() -> None:
    from hivemind.p2p import P2P

    async def echo(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                writer.write(await reader.readexactly(_ECHO_BYTES))
                await writer.drain()

    p2p = await P2P.create()
    await p2p.add_binary_stream_handler("echo", echo)
    print((await p2p.get_visible_maddrs())[0], flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await p2p.shutdown()


async def _ask_for_echoes(address: str) -> float:
    from hivemind.p2p import P2P, PeerID

    p2p = await P2P.create(initial_peers=[address])
    peer = PeerID.from_base58(address.rpartition("/")[2])
    _, reader, writer = await p2p.call_binary_stream_handler(peer, "echo")
    message, times = bytes(_ECHO_BYTES), []
    for _ in range(_ECHOES):
        began = time.perf_counter()
        writer.write(message)
        await writer.drain()
        await reader.readexactly(_ECHO_BYTES)
        times.append(time.perf_counter() - began)
    writer.close()
    await p2p.shutdown()
    return statistics.median(times) * 1e3


_PARTS: dict[str, Callable[..., object]] = {
    "--product-at": lambda at: print(_product_at(float(at))),
    "--echo": lambda: asyncio.run(_serve_echoes()),
}

if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) == 1 else (_PARTS[sys.argv[1]](*sys.argv[2:]), 0)[1])
