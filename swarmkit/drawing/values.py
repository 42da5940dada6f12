"""What is drawn: plain values, gathered by the face that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

HopState = Literal["serving", "new", "lost"]


@dataclass(frozen=True)
class HopPicture:
    """One server's part of a session's route, and the times of its last step in milliseconds.

    Attributes:
        state: `"new"` for a server that has just taken over, `"lost"` for one that has just failed.
        reason: why it was lost.
    """

    peer_id: str
    label: str
    start: int
    stop: int
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    network_ms: float = 0.0
    state: HopState = "serving"
    reason: str = ""

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.compute_ms + self.network_ms

    @property
    def blocks(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True)
class ServerPicture:
    """A server as it announces itself.

    Attributes:
        throughput: decode steps of one token per second.
        free_cache_tokens: tokens of one row for which it has room.
    """

    peer_id: str
    label: str
    start: int
    stop: int
    state: str = "online"
    throughput: float = 0.0
    free_cache_tokens: int = 0
    dtype: str = ""

    @property
    def blocks(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True)
class PipelinePicture:
    """A model in use: the route of a session, the servers beside it, and what happened last.

    Attributes:
        position: tokens per row that the session holds.
        tokens_per_s: measured over the last steps; None when no step ran lately.
        messages: the last events, one line each.
    """

    model: str
    num_blocks: int
    hops: Sequence[HopPicture] = ()
    servers: Sequence[ServerPicture] = ()
    position: int = 0
    tokens_per_s: float | None = None
    messages: Sequence[str] = ()


@dataclass(frozen=True)
class StepPicture:
    """One step of a session.

    Attributes:
        number: counts the steps from 1.
        recovered: whether a server was lost and replaced on the way.
    """

    number: int
    position: int
    tokens: int
    total_ms: float
    hops: Sequence[HopPicture]
    recovered: bool = False


@dataclass(frozen=True)
class TrainingPicture:
    """How fine-tuning goes.

    Attributes:
        losses: points of the curve, oldest first: the loss of each step, or means over equally many steps.
        tokens_per_s: rows x tokens per second, forward and backward together.
        shares: micro-batches that each server has done, by label.
        lost: micro-batches that were done again because a server failed.
        steps: how many steps there were; as many as points if not given.
        loss: the loss of the last step; the last point if not given.
    """

    losses: Sequence[float] = ()
    tokens_per_s: float = 0.0
    shares: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    steps: int | None = None
    loss: float | None = None
