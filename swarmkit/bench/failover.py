"""How long does a chat stand still when a server in use is killed?"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from swarmkit.bench.measure import random_prompt
from swarmkit.bench.options import Failover
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.events import PeerReplaced
from swarmkit.local.server_process import ServerProcess
from swarmkit.local.swarm import LocalSwarm

_PROMPT_TOKENS = 16


class _KillAfter:
    """A streamer that has a server killed, from another thread, after so many tokens, and notes the wait."""

    def __init__(self, tokens: int, victim: Callable[[], ServerProcess]) -> None:
        self._after = tokens
        self._victim = victim
        self._count = -1  # the prompt comes first
        self._thread = threading.Thread(target=self._kill, name="swarmkit-bench-kill")
        self.killed_at = 0.0
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())
        self._count += 1
        if self._count == self._after:
            self._thread.start()

    def end(self) -> None:
        self._thread.join()

    def _kill(self) -> None:
        victim = self._victim()
        self.killed_at = time.perf_counter()
        victim.kill()

    @property
    def stall_ms(self) -> float:
        """From SIGKILL to the first token that was computed without the killed server.

        A token whose step had passed the victim already may still come; the longest wait after the kill is
        the one that counts.
        """
        later = [self.killed_at, *(stamp for stamp in self.stamps if stamp > self.killed_at)]
        return max(b - a for a, b in pairwise(later)) * 1e3


def measure(options: Failover, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Kill a random server of the route with SIGKILL after a random token; two stages, two replicas each."""
    torch.set_num_threads(options.threads)
    chance = random.Random(options.seed)
    stalls, usual, replayed, equal = [], [], [], 0
    on_progress("starting", 0, options.trials)
    with LocalSwarm(
        subject.checkpoint, num_stages=2, replicas=2, processes=True, threads=options.threads
    ) as swarm:
        remote = swarm.model()
        prompt = random_prompt(subject.vocab_size, _PROMPT_TOKENS)
        generation: dict[str, Any] = {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": options.tokens,
            "min_new_tokens": options.tokens,
            "do_sample": False,
        }
        undisturbed = remote.generate(prompt, **generation)
        for trial in range(options.trials):
            stage = chance.randrange(2)
            streamer = _KillAfter(
                chance.randrange(options.tokens // 4, options.tokens * 3 // 4),
                lambda stage=stage: _server(swarm, remote.trace[-1].hops[stage].peer_id),  # type: ignore[misc]
            )
            known = len(remote.events)
            disturbed = remote.generate(prompt, streamer=streamer, **generation)
            equal += int(torch.equal(undisturbed, disturbed))
            stalls.append(streamer.stall_ms)
            usual.append(
                statistics.median(
                    step.total_ms for step in remote.trace[-options.tokens :] if step.tokens == 1
                )
            )
            replaced = [event for event in remote.events[known:] if isinstance(event, PeerReplaced)]
            replayed.append(replaced[-1].replayed_tokens if replaced else 0)
            on_progress("killed and recovered", trial + 1, options.trials)
            if trial + 1 < options.trials:
                dead = next(s for s in swarm.servers if isinstance(s, ServerProcess) and not s.alive)
                swarm.servers.remove(dead)
                swarm.add_server(dead.blocks)
                remote.connection.call(remote.connection.client.known.refresh)
    return {
        **options.values("trials"),
        "equal": equal,
        "stall_ms": [round(stall, 1) for stall in stalls],
        "stall_ms_median": round(statistics.median(stalls), 1),
        "stall_ms_max": round(max(stalls), 1),
        "usual_ms_per_token": round(statistics.median(usual), 2),
        "replayed_tokens": replayed,
        **options.values("threads"),
    }


def _server(swarm: LocalSwarm, peer_id: str) -> ServerProcess:
    return next(s for s in swarm.servers if isinstance(s, ServerProcess) and s.peer_id == peer_id)
