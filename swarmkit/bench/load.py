"""Clients that load a swarm, in processes of their own, so that they do not slow down the process that
measures.

Such a client has no model: it sends random hidden states through the servers, as the blocks of a real one
would, and checks that what comes back is finite. The child's life is in `load_process.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from swarmkit.bench.subject import Subject
from swarmkit.errors import SwarmkitError
from swarmkit.local.swarm import LocalSwarm

_STOP_GRACE_S = 20.0


@dataclass(frozen=True)
class Steps:
    """What some sessions did: the time of each step as (began, ended), and the processor time it took."""

    spans: tuple[tuple[float, float], ...]
    cpu_s: float

    @property
    def seconds(self) -> float:
        """From the first step's beginning to the last one's end."""
        return max(end for _, end in self.spans) - min(begin for begin, _ in self.spans)

    @property
    def latencies_ms(self) -> list[float]:
        return [(end - begin) * 1e3 for begin, end in self.spans]

    def beside(self, began: float, ended: float) -> Steps:
        """The steps that ran at some time between."""
        return Steps(tuple(span for span in self.spans if span[0] < ended and span[1] > began), self.cpu_s)


def together(parts: Sequence[Steps]) -> Steps:
    """What several processes did at the same time."""
    return Steps(tuple(span for part in parts for span in part.spans), sum(part.cpu_s for part in parts))


class Load:
    """One process with any number of sessions; made by `start_loads`, which ends it."""

    def __init__(self, subject: Subject, swarm: LocalSwarm, dtype: str, seed: int) -> None:
        checkpoint = subject.checkpoint
        options = {
            "name": checkpoint.name,
            "fingerprint": checkpoint.fingerprint,
            "num_blocks": checkpoint.num_blocks,
            "hidden_size": checkpoint.hidden_size,
            "peers": swarm.initial_peers,
            "dtype": dtype,
            "seed": seed,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swarmkit.bench.load_process", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )

    def tell(self, do: str, **details: Any) -> None:
        """Have it begin something; `answer` waits for the end of that."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> dict[str, Any]:
        """What came out of the last `tell`.

        Raises:
            SwarmkitError: the process ended, or what it did failed.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SwarmkitError(f"a client of this benchmark failed: {reply['error']}")
        return reply

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """`tell`, then `answer`."""
        self.tell(do, **details)
        return self.answer()

    def steps(self) -> Steps:
        """The answer to `decode`, or to the `stop` that ended it."""
        reply = self.answer()
        return Steps(tuple((begin, end) for begin, end in reply["spans"]), reply["cpu_s"])

    def end(self) -> None:
        """End the process, which leaves the swarm first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ended(self) -> SwarmkitError:
        return SwarmkitError("a client of this benchmark ended; what it said is above")


@contextmanager
def start_loads(subject: Subject, swarm: LocalSwarm, count: int, dtype: str) -> Iterator[list[Load]]:
    """So many processes, each with another seed, connected to the swarm until the block ends."""
    with ExitStack() as owned:
        loads = []
        for seed in range(count):
            loads.append(Load(subject, swarm, dtype, seed))
            owned.callback(loads[-1].end)
        for load in loads:
            load.answer()  # it is connected
        yield loads
