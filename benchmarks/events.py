"""What does a subscriber to events that never reads cost a token?

    python benchmarks/events.py
    python benchmarks/events.py --tokens 10000 --json

tiny-chat decodes over two servers in memory, all in this process. A subscription that is full after one step
is to the model's events for four tokens, and to a stream without events for the next four, so that whatever
else the machine does meets both kinds alike.

Reported, as medians over tokens:

    ms, ms_subscribed           wait for a token
    cpu_ms, cpu_ms_subscribed   processor time of the process for a token
    cost, cpu_cost              (subscribed - not) / not, of either
    emit_us, emit_us_subscribed microseconds in which a stream takes one finished step
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import timeit
from typing import Any

import torch

from swarmkit import LocalSwarm
from swarmkit.bench.environment import environment
from swarmkit.bench.measure import PATIENT, random_prompt, timed_generate
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.events import EventStream, HopTrace, Owner, StepFinished

_PROMPT_TOKENS = 16
_ANSWER_TOKENS = 250
_CAPACITY = 1
_TURN_TOKENS = 4
_EMITTED = 100_000


class _Alternating:
    """A streamer that subscribes for every other few tokens, and notes what each token took."""

    def __init__(self, model: SwarmModelForCausalLM) -> None:
        self._streams = {False: EventStream(), True: model.connection.client.events}
        self._subscribed = False
        self._unread = self._streams[False].subscribe(_CAPACITY)
        self._began: tuple[float, float] | None = None
        self._tokens = 0
        self.dropped = 0
        self.wall: dict[bool, list[float]] = {False: [], True: []}
        self.cpu: dict[bool, list[float]] = {False: [], True: []}

    def put(self, value: torch.Tensor) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        if self._began is not None:
            self.wall[self._subscribed].append((wall - self._began[0]) * 1e3)
            self.cpu[self._subscribed].append((cpu - self._began[1]) * 1e3)
        self._began = None
        if value.numel() > 1:
            return  # the prompt
        self._tokens += 1
        if self._tokens % _TURN_TOKENS:
            self._began = time.perf_counter(), time.process_time()
        else:  # the next token pays for the change, and is not counted
            self.dropped += self._unread.dropped
            self._unread.close()
            self._subscribed = not self._subscribed
            self._unread = self._streams[self._subscribed].subscribe(_CAPACITY)

    def end(self) -> None:
        self._began = None


def measure(tokens: int) -> dict[str, Any]:
    """Decode about so many tokens, in answers of equal length."""
    torch.set_num_threads(1)
    with LocalSwarm("tiny-chat", num_stages=2, transport="memory") as swarm:
        model = swarm.model(settings=PATIENT)
        prompt = random_prompt(model.config.vocab_size, _PROMPT_TOKENS)
        timed_generate(model, prompt, _ANSWER_TOKENS)
        notes = _Alternating(model)
        for _ in range(-(-tokens // _ANSWER_TOKENS)):
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=_ANSWER_TOKENS,
                min_new_tokens=_ANSWER_TOKENS,
                do_sample=False,
                streamer=notes,
            )
    assert notes.dropped >= len(notes.wall[True]) // 2
    wall, cpu = ({key: statistics.median(ms) for key, ms in each.items()} for each in (notes.wall, notes.cpu))
    return {
        "tokens": sum(map(len, notes.wall.values())),
        "ms": round(wall[False], 4),
        "ms_subscribed": round(wall[True], 4),
        "cost": round(wall[True] / wall[False] - 1, 5),
        "cpu_ms": round(cpu[False], 4),
        "cpu_ms_subscribed": round(cpu[True], 4),
        "cpu_cost": round(cpu[True] / cpu[False] - 1, 5),
        "emit_us": _emit_us(0),
        "emit_us_subscribed": _emit_us(1),
    }


def _emit_us(subscribers: int) -> float:
    """Microseconds to emit a step over two servers to so many subscribers that do not read."""
    stream = EventStream(apart={StepFinished: 256})
    hop = HopTrace("peer", "server-1", 0, 4, 0.1, 1.0, 0.2)
    step = StepFinished(9, 1, 1, 2.6, (hop, hop), time=0.0, owner=Owner("session", "peer", 1))
    unread = [stream.subscribe(_CAPACITY) for _ in range(subscribers)]
    seconds = timeit.timeit(lambda: stream.emit(step), number=_EMITTED)
    assert all(subscription.dropped for subscription in unread)
    return round(seconds / _EMITTED * 1e6, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.tokens)
    if options.json:
        print(json.dumps({"benchmark": "events", **environment(), **result}, indent=2))
    else:
        print("\n".join(f"{name:20} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
