"""What does a subscriber to events that never reads cost a token?

    python benchmarks/events.py
    python benchmarks/events.py --rounds 200 --json

tiny-chat decodes over two servers in memory. Rounds with a full subscription and rounds without take turns,
in an order that changes from pair to pair.

Reported:

    ms_per_token, ms_per_token_subscribed   medians over rounds, of each round's median wait for a token
    cost                                    median over pairs of (subscribed - not) / not
    emit_us, emit_us_subscribed             microseconds in which a stream takes one finished step
"""

from __future__ import annotations

import argparse
import json
import statistics
import timeit
from typing import Any

import torch
from tqdm import tqdm

from swarmkit import LocalSwarm
from swarmkit.bench.environment import environment
from swarmkit.bench.measure import PATIENT, random_prompt, timed_generate
from swarmkit.events import EventStream, HopTrace, Owner, StepFinished

_PROMPT_TOKENS = 16
_EMITTED = 100_000


def measure(rounds: int, tokens: int) -> dict[str, Any]:
    """Decode in `rounds` pairs of calls of `generate()`, each for `tokens` tokens."""
    torch.set_num_threads(1)
    alone: list[float] = []
    subscribed: list[float] = []
    with LocalSwarm("tiny-chat", num_stages=2, transport="memory") as swarm:
        model = swarm.model(settings=PATIENT)
        prompt = random_prompt(model.config.vocab_size, _PROMPT_TOKENS)
        for number in tqdm(range(-2, rounds), disable=None):
            for with_one in (False, True) if number % 2 else (True, False):
                if with_one:
                    with model.subscribe(capacity=8) as unread:
                        ms = timed_generate(model, prompt, tokens).ms_per_token
                    assert unread.dropped >= tokens - 8
                else:
                    ms = timed_generate(model, prompt, tokens).ms_per_token
                if number >= 0:
                    (subscribed if with_one else alone).append(ms)
    costs = [(b - a) / a for a, b in zip(alone, subscribed, strict=True)]
    return {
        "rounds": rounds,
        "tokens": tokens,
        "ms_per_token": round(statistics.median(alone), 4),
        "ms_per_token_subscribed": round(statistics.median(subscribed), 4),
        "cost": round(statistics.median(costs), 5),
        "emit_us": _emit_us(0),
        "emit_us_subscribed": _emit_us(1),
    }


def _emit_us(subscribers: int) -> float:
    """Microseconds to emit a step over two servers to so many subscribers that do not read."""
    stream = EventStream(apart={StepFinished: 256})
    hop = HopTrace("peer", "server-1", 0, 4, 0.1, 1.0, 0.2)
    step = StepFinished(9, 1, 1, 2.6, (hop, hop), time=0.0, owner=Owner("session", "peer", 1))
    unread = [stream.subscribe(capacity=8) for _ in range(subscribers)]
    seconds = timeit.timeit(lambda: stream.emit(step), number=_EMITTED)
    assert all(subscription.dropped for subscription in unread)
    return round(seconds / _EMITTED * 1e6, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.rounds, options.tokens)
    if options.json:
        print(json.dumps({"benchmark": "events", **environment(), **result}, indent=2))
    else:
        print("\n".join(f"{name:26} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
