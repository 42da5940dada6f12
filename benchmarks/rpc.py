"""What the protocol layer costs: requests and answers between two peers on this machine, without a model.

    python benchmarks/rpc.py --transport hivemind

Both peers run in this process and on one event loop, so that a round trip has the work of both sides in it:

* `request_us`: an empty request (`GetInfo`) and its answer.
* `step_us`: a decode step of one token (hidden size 896, float32), with its checks, admission and answer.
* `payload_ms`: a step of 64 MiB, received into new memory and turned into a tensor; the answer is empty.
* `into_buffer_ms`: the same, received into one buffer again and again.

Each figure is the median over the repetitions, in microseconds or milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

import torch

from swarmkit.net.protocol import codec
from swarmkit.net.protocol.messages import SESSION, GetInfo, Open, Opened, ServerInfo, Step, StepDone
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.endpoints import connect, listen
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Stream, Transport

HIDDEN_SIZE = 896
LARGE_TOKENS = 64 * 1024**2 // (HIDDEN_SIZE * 4)
INFO = ServerInfo(0, 4, 1, 1000, 2000, 7, False)
NOTHING = torch.zeros(1, 0, HIDDEN_SIZE)


class Service:
    """Answers as a server's session service does, but computes nothing."""

    def __init__(self) -> None:
        self._budget = ReceiveBudget(512 * 1024**2)
        self.buffer: bytearray | None = None
        """Where large payloads are received; None = into new memory."""

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until it ends."""
        served = ServerStream(stream, SESSION, max_payload_bytes=2**30, message_timeout=60.0)
        await served.serve(lambda incoming: self._answer(served, incoming))

    async def _answer(self, stream: ServerStream, incoming: IncomingMessage) -> None:
        message = incoming.message
        if isinstance(message, GetInfo):
            await stream.send(INFO)
        elif isinstance(message, Open):
            await stream.send(Opened(1024))
        else:
            with ReceiveReservation(self._budget) as room:
                await room.take(incoming.nbytes, 2.0)
                await incoming.payload(self.buffer if incoming.nbytes > 2**20 else None)
                output = incoming.tensor(message.hidden)
                spec, data = codec.encode(output if output.shape[1] == 1 else NOTHING)
                await stream.send(StepDone(spec, 0.0, 0.0, number=message.number), [data])


async def peers(kind: str) -> tuple[Transport, Transport]:
    """A serving peer and an asking one."""
    if kind == "memory":
        network = MemoryNetwork()
        return network.transport(), network.transport()
    from swarmkit.net.hivemind.transport import HivemindTransport

    serving = await HivemindTransport.create()
    return serving, await HivemindTransport.create(initial_peers=serving.addresses)


async def median_s(act: Callable[[], Awaitable[Any]], times: int) -> float:
    """The median of what one call takes, after a few that are not counted."""
    for _ in range(max(1, times // 10)):
        await act()
    seconds = []
    for _ in range(times):
        began = perf_counter()
        await act()
        seconds.append(perf_counter() - began)
    return statistics.median(seconds)


async def step(stream: ClientStream, hidden: torch.Tensor) -> torch.Tensor:
    """Have one step done, as a client does."""
    spec, data = codec.encode(hidden)
    with stream.within(60.0):
        await stream.send(Step(0, spec, 1, number=1, patience_s=60.0), [data])
    with stream.within(60.0):
        incoming = await stream.receive()
    return incoming.tensor(incoming.message.hidden)


async def measure(kind: str, requests: int) -> dict[str, float]:
    """Take all figures."""
    serving, asking = await peers(kind)
    try:
        service = Service()
        await listen(serving, SESSION, service.serve)
        stream = await connect(asking, SESSION, serving.peer_id, serving.addresses, max_payload_bytes=2**20)

        async def request() -> None:
            with stream.within(60.0):
                await stream.ask(GetInfo(), ServerInfo)

        request_s = await median_s(request, requests)
        await stream.ask(Open("0" * 32, 0, 4, 10), Opened)
        token = torch.randn(1, 1, HIDDEN_SIZE)
        step_s = await median_s(lambda: step(stream, token), requests)
        large = torch.randn(1, LARGE_TOKENS, HIDDEN_SIZE)
        # The C library learns what sizes to keep from what is freed; a process with a model has done so.
        bytes(31 * 1024**2)
        payload_s = await median_s(lambda: step(stream, large), 15)
        service.buffer = bytearray(large.nbytes)
        into_buffer_s = await median_s(lambda: step(stream, large), 15)
    finally:
        await asking.close()
        await serving.close()
    return {
        "request_us": round(request_s * 1e6, 1),
        "step_us": round(step_s * 1e6, 1),
        "payload_ms": round(payload_s * 1e3, 1),
        "into_buffer_ms": round(into_buffer_s * 1e3, 1),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", choices=["hivemind", "memory"], default="hivemind")
    parser.add_argument("--requests", type=int, default=3000, help="repetitions; 3000 by default")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.transport, options.requests))))


if __name__ == "__main__":
    main()
