"""What decisions about placement are made of: a model's sizes, machines, demand, and who serves what."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmkit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """How much memory a model takes.

    Attributes:
        num_blocks: blocks of the whole model.
        block_bytes: weights of one block (the largest, if they differ).
        token_bytes: keys and values of one token of one row in one block.
    """

    num_blocks: int
    block_bytes: float
    token_bytes: float

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_bytes <= 0 or self.token_bytes < 0:
            raise UsageError(f"a model has blocks, and they take memory; got {self}")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A computer that can serve blocks.

    Attributes:
        name: of the server, which no other one has.
        memory_bytes: for the weights of blocks and for sessions' caches, together.
        decode_s: seconds that one token alone spends in one block.
        token_s: seconds for each of many tokens in one block: a prompt, or the tokens of many sessions.
        way_s: seconds that each visit of a token adds: the way there, and the serialisation.
        link_rate: tokens per second that its network carries.
    """

    name: str = ""
    memory_bytes: float
    decode_s: float
    token_s: float
    way_s: float = 0.0
    link_rate: float = math.inf

    def __post_init__(self) -> None:
        if not (self.memory_bytes >= 0 and self.decode_s > 0 and self.token_s > 0 and self.link_rate > 0):
            raise UsageError(f"a machine has memory, a network, and takes time for a token; got {self}")

    def rate(self, blocks: int) -> float:
        """Tokens per second through so many blocks, where there are enough sessions."""
        return min(1 / (self.token_s * blocks), self.link_rate)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What clients ask for.

    Attributes:
        arrivals_per_s: requests per second in the whole swarm; 0 = not known.
        prompt_tokens, answer_tokens: of a usual request.
        most_tokens: of a long session, prompt and answer together; 0 = as a usual request.
        session_s: seconds that a session holds its caches besides.
    """

    arrivals_per_s: float = 0.0
    prompt_tokens: float = 128.0
    answer_tokens: float = 128.0
    most_tokens: float = 0.0
    session_s: float = 0.0

    def __post_init__(self) -> None:
        if self.arrivals_per_s < 0 or self.prompt_tokens < 0 or self.answer_tokens <= 0:
            raise UsageError(f"requests ask for one token or more, at a rate of 0 or more; got {self}")

    @property
    def tokens(self) -> float:
        """Tokens that the cache of a usual session holds in the end."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def reserved_tokens(self) -> float:
        """Tokens that are reserved for one session."""
        return max(self.tokens, self.most_tokens)

    def sessions(self, answer_s: float) -> float:
        """Sessions that are open at a time, on average, where each lasts `answer_s` (Little's law)."""
        return self.arrivals_per_s * (answer_s + self.session_s)


@dataclass(frozen=True)
class Served:
    """Blocks [start, stop) that a server serves, as far as others know.

    Attributes:
        throughput: tokens per second through all its blocks.
        name: of the server.
        decode_s: seconds that one token alone spends in one block; 0 = what the throughput implies.
        way_s: seconds that each visit of a token adds.
        cache_tokens: tokens that its caches hold in all its blocks, whether free or not.
    """

    start: int
    stop: int
    throughput: float
    name: str = ""
    decode_s: float = 0.0
    way_s: float = 0.0
    cache_tokens: float = math.inf

    @property
    def blocks(self) -> int:
        return self.stop - self.start

    @property
    def block_s(self) -> float:
        """Seconds that one token alone spends in one block."""
        return self.decode_s or 1 / (max(self.throughput, 1e-9) * max(self.blocks, 1))


def served_by(machine: Machine, start: int, stop: int, model: ModelSize) -> Served:
    """What a machine is worth to others if it serves blocks [start, stop)."""
    return Served(
        start,
        stop,
        machine.rate(stop - start),
        machine.name,
        machine.decode_s,
        machine.way_s,
        cache_tokens(machine, stop - start, model),
    )


def cache_tokens(machine: Machine, blocks: int, model: ModelSize) -> float:
    """Tokens that fit into a machine's caches in each of its blocks, if it serves so many."""
    left = machine.memory_bytes - blocks * model.block_bytes
    if left <= 0:
        return 0.0
    return left / (blocks * model.token_bytes) if model.token_bytes else math.inf


def blocks_that_fit(machine: Machine, model: ModelSize, reserved_tokens: float = 0.0) -> int:
    """The most blocks that a machine holds beside caches of so many tokens in each of them; 0 to all."""
    each = model.block_bytes + reserved_tokens * model.token_bytes
    return max(0, min(model.num_blocks, int(machine.memory_bytes / each + 1e-9)))
