"""How fast is a client beside a stranger that takes all that it can get of a server?

    python -m benchmarks.shares --json > benchmarks/results/shares-tiny-chat.json     (about 9 minutes)
    python -m benchmarks.shares --kind gradients --kind "direct connections"

One server has all blocks of tiny-chat, which it fetches from a stand-in for the Hub, so that it hands them
out. A client generates answers there, each in a session of its own. For each kind of thing that a server has,
a stranger (`tests/takers.py`) takes as much of it as it can for a while, and then goes. Server, client and
stranger are processes of their own with p2p daemons of their own, on loopback. The stranger runs at the
lowest priority: in the world it has a processor of its own.

Here it has none, and what its own processes compute is taken from the server and the client too, which says
nothing about the server. So there is a control: after the stranger has gone, processes that have nothing to
do with the swarm compute as much as its processes did, at the same priority. What the client gets beside the
stranger, against what it gets beside the control, is what the server gives away.

Reported for each kind, in tokens per second and in processors (seconds of processor time per second):

    alone          without the stranger: the median of the windows before and after
    beside         while it takes
    control        beside processes that compute as much as the stranger's do
    raw            beside / alone
    ratio          beside / the smaller of control and alone; at least 0.5 is wanted
    waits_s        the longest wait for one token beside the stranger, the first of an answer included
    stranger_cpu   what the stranger's processes computed
    control_cpu    what those of the control did: where it is less, `ratio` is too low
    server_cpu     what the server's processes computed beside the stranger, and alone
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_REPO = "bench/tiny-chat"
_ANSWER_TOKENS = 32
_PROMPT_TOKENS = 8
_NICE = 19
_READY_S = 90.0
_LULL_S = 3.0
"""For the stranger to get hold of what it takes, and for the server to be rid of it when it has gone."""
_BURN_TURNS = 10_000
"""About half a millisecond."""
_BURN_PAUSE_S = 0.001
BOUND = 0.5


@dataclass(frozen=True)
class Window:
    """What a client got in some seconds."""

    tokens_per_s: float
    longest_s: float
    cpu: Mapping[str, Sequence[float]]
    """By whose processes they are, the processors that each of them kept busy."""


def cpu_times(pid: int) -> dict[int, float]:
    """The seconds of processor time that a process and those below it have had, by process."""
    import psutil

    times = {}
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                spent = one.cpu_times()
                times[one.pid] = spent.user + spent.system
    return times


def processors(before: Mapping[int, float], after: Mapping[int, float], seconds: float) -> list[float]:
    """How many processors each of some processes kept busy for some seconds."""
    return [(spent - before.get(pid, 0.0)) / seconds for pid, spent in after.items()]


@dataclass(frozen=True)
class Result:
    """Of one kind of stranger."""

    kind: str
    alone: float
    beside: float
    control: float
    raw: float
    ratio: float
    waits_s: float
    stranger_cpu: float
    control_cpu: float
    server_cpu: float
    server_cpu_alone: float


# ---------------------------------------------------------------------- the client


def generate(model: Any, seconds: float, watched: Mapping[str, int]) -> Window:
    """Generate answers one after the other for so many seconds.

    Args: watched: the processes of which it is noted how much they compute meanwhile, by a name.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Stopwatch(BaseStreamer):
        """Notes when tokens come."""

        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is left to say."""

    prompt = torch.arange(5, 5 + _PROMPT_TOKENS)[None]
    times: list[float] = []
    began = time.perf_counter()
    cpu = {name: cpu_times(pid) for name, pid in watched.items()}
    answers = 0
    while time.perf_counter() - began < seconds:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_ANSWER_TOKENS,
            min_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
            streamer=Stopwatch(),
        )
        answers += 1
    spent = time.perf_counter() - began
    longest = max(later - earlier for earlier, later in zip([began, *times], times, strict=False))
    busy = {name: processors(cpu[name], cpu_times(pid), spent) for name, pid in watched.items()}
    return Window(answers * _ANSWER_TOKENS / spent, longest, busy)


def measure(kinds: Sequence[str], seconds: float, verbose: bool) -> list[Result]:
    """The results of each kind of stranger beside one client."""
    import torch

    from swarmkit import LocalSwarm
    from swarmkit.settings import ClientSettings

    torch.set_num_threads(1)
    results = []
    # Each answer is computed, and by one token at a time: what a client asks for does not change with luck.
    settings = ClientSettings().replace(speculation="off", prefix_cache_bytes=0, check_share=0.0)
    with LocalSwarm(_REPO, 1, processes=True, client_settings=settings) as swarm, swarm.model() as model:
        server = {"server": swarm.servers[0].pid}
        generate(model, seconds, server)  # does not count
        for kind in kinds:
            before = generate(model, seconds, server)
            with _stranger(kind, swarm.initial_peers, swarm.servers[0].pid) as pid:
                time.sleep(_LULL_S)
                beside = generate(model, seconds, {**server, "stranger": pid})
            time.sleep(_LULL_S)
            with _control(beside.cpu["stranger"]) as burning:
                control = generate(model, seconds, burning)
            time.sleep(_LULL_S)
            after = generate(model, seconds, server)
            results.append(_result(kind, before, beside, control, after))
            if verbose:
                print(_line(results[-1]), flush=True)
    return results


def _result(kind: str, before: Window, beside: Window, control: Window, after: Window) -> Result:
    alone = statistics.median([before.tokens_per_s, after.tokens_per_s])
    possible = min(alone, control.tokens_per_s)
    server_alone = statistics.median([sum(before.cpu["server"]), sum(after.cpu["server"])])
    return Result(
        kind,
        round(alone, 1),
        round(beside.tokens_per_s, 1),
        round(control.tokens_per_s, 1),
        round(beside.tokens_per_s / alone, 3),
        round(beside.tokens_per_s / possible, 3),
        round(beside.longest_s, 3),
        round(sum(beside.cpu["stranger"]), 2),
        round(sum(sum(busy) for busy in control.cpu.values()), 2),
        round(sum(beside.cpu["server"]), 2),
        round(server_alone, 2),
    )


_HEADINGS = f"{'':20} {'alone':>7} {'beside':>7} {'control':>7} {'raw':>6} {'ratio':>6} {'waits_s':>8}  CPU"


def _line(one: Result) -> str:
    return (
        f"{one.kind:20} {one.alone:7.1f} {one.beside:7.1f} {one.control:7.1f} {one.raw:6.2f} "
        f"{one.ratio:6.2f} {one.waits_s:8.2f}  stranger {one.stranger_cpu:.2f}, "
        f"control {one.control_cpu:.2f}, server {one.server_cpu:.2f} (alone {one.server_cpu_alone:.2f})"
    )


# ---------------------------------------------------------------------- the control


@contextmanager
def _control(busy: Sequence[float]) -> Iterator[dict[str, int]]:
    """Processes that keep as many processors busy, each as many as one of the stranger's, or a part of that.

    Yields: their process ids, by a name.
    """
    shares = [share / parts for share in busy for parts in [math.ceil(share)] for _ in range(parts)]
    with ExitStack() as running:
        burning = [running.enter_context(_child("--burn", str(share))) for share in shares]
        yield {f"control {number}": process.pid for number, process in enumerate(burning)}


def _burn(share: float) -> None:
    """Compute for a share of the time, until standard input ends."""
    import threading

    ended = threading.Event()
    began, spent = time.perf_counter(), time.process_time()
    print("ready", flush=True)

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    while not ended.is_set():
        if time.process_time() - spent < share * (time.perf_counter() - began):
            sum(number * number for number in range(_BURN_TURNS))
        else:
            ended.wait(_BURN_PAUSE_S)


# ---------------------------------------------------------------------- the stranger


@contextmanager
def _stranger(kind: str, initial_peers: Sequence[str], server_pid: int) -> Iterator[int]:
    """A process in which a stranger takes, until the block ends; yields its id."""
    told = {"kind": kind, "initial_peers": list(initial_peers), "server_pid": server_pid}
    with _child("--stranger", json.dumps(told)) as process:
        yield process.pid


@contextmanager
def _child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """This program once more, at the lowest priority, from when it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.shares", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise RuntimeError(f"the process of {arguments} did not start; what it said is above")
        yield process
    finally:
        process.stdin.close()  # which ends it
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


async def _take(kind: str, initial_peers: Sequence[str], server_pid: int) -> None:
    """The life of a stranger's process."""
    import anyio
    import anyio.to_thread
    import torch

    from swarmkit.models.checkpoint.checkpoint import Checkpoint
    from swarmkit.net.connect import joined, over_hivemind
    from swarmkit.net.transport.identity import Identity
    from tests.takers import KINDS, Target, take

    torch.set_num_threads(1)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it tells of each stream that was ended
    checkpoint = Checkpoint.open(_REPO, progress=False)
    async with joined(over_hivemind(initial_peers), Identity()) as (transport, registry):
        found = await registry.wait_for(
            checkpoint.fingerprint,
            checkpoint.num_blocks,
            lambda view: bool(view.servers(time.time(), ("online",))),
            timeout=_READY_S,
        )
        (server,) = found.servers(time.time(), ("online",))
        target = Target(
            transport,
            server.peer_id,
            server.fingerprint,
            server.start,
            server.stop,
            checkpoint.hidden_size,
            addresses=server.addresses,
            service=server.service,
            port=_direct_port(server_pid),
            files=await _files(transport, checkpoint) if kind == "weights" else (),
        )
        taking, number = KINDS[kind]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take, target, taking, number)
            print("ready", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            tasks.cancel_scope.cancel()


def _direct_port(server_pid: int) -> int:
    """Where a server takes direct streams: the only port at which its own process listens."""
    import psutil

    connections = psutil.Process(server_pid).net_connections("tcp")
    (port,) = {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    return int(port)


async def _files(transport: Any, checkpoint: Any) -> list[str]:
    """The hashes of the files that are offered of a model."""
    from swarmkit.server.weights.transfer import look_up

    blocks = list(range(checkpoint.num_blocks))
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        offered = await look_up(transport, checkpoint.fingerprint, blocks, time.time())
        if found := sorted({offer.content for offers in offered.values() for offer in offers}):
            return found
        await asyncio.sleep(0.5)
    raise RuntimeError("the server offers no weights")


# ---------------------------------------------------------------------- both


def main() -> int:
    """Measure, and print a table or JSON; 1 if a ratio is below the bound."""
    from tests.models.hub import local_hub
    from tests.takers import KINDS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="all if not given")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each window")
    parser.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    parser.add_argument("--stranger", help=argparse.SUPPRESS)
    parser.add_argument("--burn", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stranger or given.burn is not None:
        os.nice(_NICE)
        if given.stranger:
            asyncio.run(_take(**json.loads(given.stranger)))
        else:
            _burn(given.burn)
        return 0

    import swarmkit.tinychat

    kinds = given.kind or list(KINDS)
    with (
        tempfile.TemporaryDirectory(prefix="swarmkit-bench-shares-") as home,
        local_hub({_REPO: Path(swarmkit.tinychat.__file__).parent / "checkpoint"}) as hub,
    ):
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "SWARMKIT_STORE_DIR": f"{home}/store"}
        os.environ.update(own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"})
        if not given.json:
            print(_HEADINGS)
        results = measure(kinds, given.seconds, verbose=not given.json)
    if given.json:
        from swarmkit.bench.environment import environment

        told = environment() | {"command": " ".join(["python -m benchmarks.shares", *sys.argv[1:]])}
        print(json.dumps(told | {"benchmark": "shares", "rows": [asdict(row) for row in results]}, indent=2))
    return int(any(row.ratio < BOUND for row in results))


if __name__ == "__main__":
    sys.exit(main())
