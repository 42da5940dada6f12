"""What sessions a placement carries, how fast each is, and how long an answer takes on average. Pure.

Following "Serving Chain-structured Jobs with Large Memory Footprints" (arXiv 2604.14993): a placement is cut
into chains of servers, the fastest first, each with as many sessions as its caches have room for (its
algorithm 2); sessions take the fastest chain that has room; and the mean time of an answer, waiting included,
is bounded from below by a birth-death process in which the fastest chains are always the busy ones (its
theorem 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swarmkit.placement.description import Demand, Machine, ModelSize


@dataclass(frozen=True)
class MachineSpan:
    """Blocks [start, stop) on a machine."""

    machine: Machine
    start: int
    stop: int


@dataclass(frozen=True)
class ServerChain:
    """Servers that run all blocks one after the other.

    Attributes:
        parts: the number of the server in the placement, and the blocks [start, stop) that it runs.
        answer_s: seconds of one answer.
        sessions: that may be open on it at a time.
    """

    parts: tuple[tuple[int, int, int], ...]
    answer_s: float
    sessions: int


def visit_s(machine: Machine, blocks: int, demand: Demand) -> float:
    """Seconds of an answer at a machine for so many blocks: first the prompt, then token by token."""
    each = demand.prompt_tokens * machine.token_s + demand.answer_tokens * machine.decode_s
    return blocks * each + (demand.answer_tokens + 1) * machine.way_s


def compose_chains(
    placed: Sequence[MachineSpan], model: ModelSize, demand: Demand, *, enough: float = math.inf
) -> list[ServerChain]:
    """The chains of a placement, fastest first, until they carry `enough` sessions or no cache is left."""
    room = [
        (one.machine.memory_bytes - (one.stop - one.start) * model.block_bytes)
        / max(demand.reserved_tokens * model.token_bytes, 1e-12)
        for one in placed
    ]  # block-sessions: what one session takes in one block
    chains: list[ServerChain] = []
    total = 0
    while total < enough:
        chain = _fastest(placed, room, model.num_blocks, demand)
        if chain is None:
            break
        for number, start, stop in chain.parts:
            room[number] -= chain.sessions * (stop - start)
        total += chain.sessions
        chains.append(chain)
    return chains


def _fastest(
    placed: Sequence[MachineSpan], room: Sequence[float], num_blocks: int, demand: Demand
) -> ServerChain | None:
    """The fastest chain all of whose servers have room for one session more; each is used to its end."""
    best: dict[int, tuple[float, tuple[int, int, int] | None]] = {0: (0.0, None)}
    for number in sorted(range(len(placed)), key=lambda one: (placed[one].stop, placed[one].start)):
        one = placed[number]
        for low, (seconds, _) in list(best.items()):
            if one.start <= low < one.stop and room[number] >= (one.stop - low) * (1 - 1e-9):
                total = seconds + visit_s(one.machine, one.stop - low, demand)
                if one.stop not in best or total < best[one.stop][0]:
                    best[one.stop] = (total, (number, low, one.stop))
    if num_blocks not in best:
        return None
    parts: list[tuple[int, int, int]] = []
    position = num_blocks
    while position:
        part = best[position][1]
        assert part is not None
        parts.append(part)
        position = part[1]
    sessions = min(int(room[number] / (stop - low) + 1e-9) for number, low, stop in parts)
    return ServerChain(tuple(reversed(parts)), best[num_blocks][0] + demand.session_s, sessions)


def sessions_per_s(chains: Sequence[ServerChain]) -> float:
    """Answers per second where every chain is full."""
    return sum(chain.sessions / chain.answer_s for chain in chains)


def expected_answer_s(chains: Sequence[ServerChain], arrivals_per_s: float) -> float:
    """Mean seconds from a request to the end of its answer, waiting included; inf if requests come too fast.

    The lower bound of theorem 4: the states are the numbers of open sessions n; answers end at the rate of
    the n fastest places; by Little's law the mean time is the mean number of sessions over the rate of
    arrivals.
    """
    ordered = sorted(chains, key=lambda chain: chain.answer_s)
    if not ordered:
        return math.inf
    if not arrivals_per_s:
        return ordered[0].answer_s
    full = sessions_per_s(ordered)
    if arrivals_per_s >= full:
        return math.inf
    logs, rate, log = [0.0], 0.0, 0.0
    for chain in ordered:
        for _ in range(chain.sessions):
            rate += 1 / chain.answer_s
            log += math.log(arrivals_per_s / rate)
            logs.append(log)
    top = max(logs)
    weights = [math.exp(one - top) for one in logs]
    places, load = len(logs) - 1, arrivals_per_s / full
    tail = weights[-1] * load / (1 - load)
    mean = sum(n * weight for n, weight in enumerate(weights))
    mean += weights[-1] * (places * load / (1 - load) + load / (1 - load) ** 2)
    return mean / (sum(weights) + tail) / arrivals_per_s
