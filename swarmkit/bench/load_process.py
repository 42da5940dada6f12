"""The child's side of `load.py`: does what each line of its standard input says, until that closes.

==========  ============================  =====================================================
`do`        with                          what happens
==========  ============================  =====================================================
`open`      sessions, prompt, max_length  sessions are opened, each with a prompt of so many tokens
`decode`    tokens                        every session takes so many steps of one token; null =
                                          until a line says `stop`
`prefill`   tokens                        a session of its own takes one step of so many tokens
`close`                                   all sessions end
==========  ============================  =====================================================
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from typing import Any, TypeAlias

import anyio
import psutil
import torch

from swarmkit.bench.measure import PATIENT
from swarmkit.client.session.chain import ChainSession
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.client.swarm.connection import AloneHost
from swarmkit.net.connect import over_hivemind

Lines: TypeAlias = "asyncio.Queue[dict[str, Any] | None]"


class _LoadClients:
    """The sessions of this process, and what they are told to do."""

    def __init__(self, client: SwarmClient, lines: Lines, dtype: torch.dtype, seed: int) -> None:
        self._client = client
        self._lines = lines
        self._dtype = dtype
        self._random = torch.Generator().manual_seed(seed)
        self._sessions: list[ChainSession] = []
        self._enough = False

    async def run(self) -> None:
        """Do what comes, line by line, until nothing more can come."""
        while (line := await self._lines.get()) is not None:
            _reply(await getattr(self, line.pop("do"))(**line))

    async def open(self, sessions: int, prompt: int, max_length: int) -> dict[str, Any]:
        self._sessions = [ChainSession(self._client, max_length) for _ in range(sessions)]
        for session in self._sessions:  # one by one: how they start is not what is measured
            await self._step(session, prompt)
        return {}

    async def decode(self, tokens: int | None) -> dict[str, Any]:
        spans: list[tuple[float, float]] = []
        cpu_before = _cpu_s()
        self._enough = False
        async with anyio.create_task_group() as tasks:
            for session in self._sessions:
                tasks.start_soon(self._decode, session, tokens, spans)
            if tokens is None:
                await self._lines.get()
                self._enough = True  # steps under way are finished: the longest of all may be among them
        return {"spans": spans, "cpu_s": _cpu_s() - cpu_before}

    async def prefill(self, tokens: int) -> dict[str, Any]:
        session = ChainSession(self._client, tokens)
        try:
            began = time.monotonic()
            await self._step(session, tokens)
            return {"began": began, "ended": time.monotonic()}
        finally:
            session.close()

    async def close(self) -> dict[str, Any]:
        for session in self._sessions:
            session.close()
        self._sessions = []
        return {}

    async def _decode(
        self, session: ChainSession, tokens: int | None, spans: list[tuple[float, float]]
    ) -> None:
        done = 0
        while done != tokens and not self._enough:
            began = time.monotonic()
            await self._step(session, 1)
            spans.append((began, time.monotonic()))
            done += 1

    async def _step(self, session: ChainSession, tokens: int) -> None:
        hidden = torch.randn(1, tokens, self._client.model.hidden_size, generator=self._random)
        output = await session.step(hidden.to(self._dtype))
        if not bool(output.isfinite().all()):
            raise ValueError("an output is not finite")


def _cpu_s() -> float:
    """Processor time of this process and of its p2p daemon."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _reply(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _read_lines(loop: asyncio.AbstractEventLoop, lines: Lines) -> None:
    for line in sys.stdin:
        loop.call_soon_threadsafe(lines.put_nowait, json.loads(line))
    loop.call_soon_threadsafe(lines.put_nowait, None)


async def _main(options: dict[str, Any]) -> None:
    model = ModelRef(options["name"], options["fingerprint"], options["num_blocks"], options["hidden_size"])
    client = SwarmClient(model, PATIENT)
    host = AloneHost(over_hivemind(options["peers"], client_mode=True))
    lines: Lines = asyncio.Queue()
    clients = _LoadClients(client, lines, getattr(torch, options["dtype"]), options["seed"])
    # ends with standard input, which the parent closes
    reader = threading.Thread(target=_read_lines, args=(asyncio.get_running_loop(), lines))
    async with anyio.create_task_group() as tasks:
        await tasks.start(host.run_client, client)
        _reply({})
        reader.start()
        try:
            await clients.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it
            _reply({"error": repr(error)})
            while await lines.get() is not None:
                pass
        await clients.close()
        client.request_stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(_main(json.loads(sys.argv[1])))
