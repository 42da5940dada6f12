"""What does each server of a chain add to a token? Decode over 1, 2, 4 … stages, against the local model."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from swarmkit.local import LocalSwarm
from swarmkit.models.checkpoint import Checkpoint
from swarmkit.models.head import load_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class DecodeResult:
    """One chain length. Times are medians over rounds, in milliseconds per generated token.

    `added_ms_per_hop` is (swarm - local) / stages: everything that a hop costs beyond the model's own work,
    the split of that work included. `network_ms_per_hop` is the part between client and server, both
    ways, as the client's trace has it.
    """

    stages: int
    swarm_ms_per_token: float
    local_ms_per_token: float
    tokens_per_s: float
    local_tokens_per_s: float
    ratio_to_local: float
    added_ms_per_hop: float
    network_ms_per_hop: float
    queue_ms_per_hop: float
    compute_ms_per_token: float


def bench_decode(
    model: str,
    stages: Sequence[int],
    *,
    tokens: int = 64,
    rounds: int = 5,
    threads: int = 1,
    dtype: str = "float32",
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure greedy decoding of one row, servers as processes on loopback, `threads` torch threads each.

    Local and swarm take turns, round by round, so that a drift of the machine meets both. The first round of
    each is not counted.
    """
    torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(model)
    local = load_local(checkpoint, dtype=dtype)
    prompt = torch.arange(3, 3 + _PROMPT_TOKENS).unsqueeze(0) % checkpoint.config.vocab_size
    results = []
    for count in stages:
        total = rounds + 1
        on_progress(f"{count} stages", 0, total)
        with LocalSwarm(checkpoint, num_stages=count, processes=True, threads=threads, dtype=dtype) as swarm:
            remote = swarm.model(dtype=dtype)
            times_local, times_swarm, hops = [], [], []
            for number in range(total):
                here, expected = _ms_per_token(local, prompt, tokens)
                there, found = _ms_per_token(remote, prompt, tokens)
                if dtype == "float32" and not torch.equal(expected, found):
                    raise AssertionError("the swarm's tokens differ from the local model's")
                if number:
                    times_local.append(here)
                    times_swarm.append(there)
                    hops += [step.hops for step in remote.trace[-(tokens - 1) :] if step.tokens == 1]
                on_progress(f"{count} stages", number + 1, total)
            results.append(_result(count, times_local, times_swarm, hops))
    return {
        "model": checkpoint.name if model == "tiny-chat" else f"random Llama, {_describe(checkpoint)}",
        "tokens": tokens,
        "rounds": rounds,
        "threads": threads,
        "dtype": dtype,
        "results": [asdict(result) for result in results],
    }


def _ms_per_token(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, torch.Tensor]:
    """Milliseconds per token after the first one, and the tokens."""
    stamps: list[float] = []

    class Stamp:
        def put(self, value: torch.Tensor) -> None:
            stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    gc.collect()
    out = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=Stamp(),
    )
    # The first stamp is the prompt's, the second the first token's, which pays for the prompt.
    return statistics.median(b - a for a, b in pairwise(stamps[1:])) * 1e3, out


def _result(count: int, local: list[float], swarm: list[float], hops: list[Any]) -> DecodeResult:
    local_ms, swarm_ms = statistics.median(local), statistics.median(swarm)
    each = [hop for step in hops for hop in step]
    return DecodeResult(
        stages=count,
        swarm_ms_per_token=round(swarm_ms, 3),
        local_ms_per_token=round(local_ms, 3),
        tokens_per_s=round(1e3 / swarm_ms, 1),
        local_tokens_per_s=round(1e3 / local_ms, 1),
        ratio_to_local=round(statistics.median(a / b for a, b in zip(local, swarm, strict=True)), 3),
        added_ms_per_hop=round(
            statistics.median(b - a for a, b in zip(local, swarm, strict=True)) / count, 3
        ),
        network_ms_per_hop=round(statistics.median(hop.network_ms for hop in each), 3),
        queue_ms_per_hop=round(statistics.median(hop.queue_ms for hop in each), 3),
        compute_ms_per_token=round(statistics.median(sum(h.compute_ms for h in step) for step in hops), 3),
    )


def _describe(checkpoint: Checkpoint) -> str:
    return f"hidden {checkpoint.hidden_size}, {checkpoint.num_blocks} blocks"
