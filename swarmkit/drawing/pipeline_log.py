"""What a picture of a pipeline remembers of the events of a client."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from swarmkit.drawing.values import HopPicture, PipelinePicture, ServerPicture, StepPicture
from swarmkit.events import (
    Event,
    HopTrace,
    MicroBatchFinished,
    PeerLost,
    PeerReplaced,
    Rerouted,
    StepFinished,
)

_LOST_SHOWN_S = 1.2
"""How long a lost server stays in the route, in red, before its replacement takes its place."""

_NEWS_SHOWN_S = 10.0
"""How long a replacement is marked as new, and a lost server stays in the list of servers."""

_RATE_WINDOW_S = 3.0
_MESSAGES = 3
_STEPS_KEPT = 200


class PipelineLog:
    """Follows one session at a time: the one whose step came last.

    Every time is Unix time in seconds, as events have it.
    """

    def __init__(self) -> None:
        self._session = 0
        self._count = 0
        self._steps: deque[tuple[float, StepPicture]] = deque(maxlen=_STEPS_KEPT)
        self._lost: dict[str, tuple[float, HopPicture]] = {}
        self._new: dict[str, float] = {}
        self._messages: deque[tuple[float, str]] = deque(maxlen=_MESSAGES)

    def add(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, StepFinished):
            self._add_step(event)
            return
        if isinstance(event, MicroBatchFinished):
            return
        if isinstance(event, PeerLost):
            hop = HopPicture(
                event.peer_id, event.label, event.start, event.stop, state="lost", reason=event.reason
            )
            self._lost[event.peer_id] = (event.time, hop)
        elif isinstance(event, PeerReplaced | Rerouted):
            self._new.update(dict.fromkeys(event.replaced_by, event.time))
        self._messages.append((event.time, str(event)))

    def steps(self) -> list[StepPicture]:
        """The last steps of the session, oldest first."""
        return [step for _, step in self._steps]

    def is_active(self, now: float) -> bool:
        """Whether a step finished within the last second."""
        return bool(self._steps) and now - self._steps[-1][0] < 1.0

    def picture(
        self,
        model: str,
        num_blocks: int,
        servers: Sequence[ServerPicture],
        now: float,
        is_last: bool = False,
    ) -> PipelinePicture:
        """What there is to see now.

        Args:
            servers: the servers of the model, as they announce themselves.
            is_last: whether no picture follows, so that lost servers are not shown in the place of others.
        """
        last = self._steps[-1][1] if self._steps else None
        fresh = {peer for peer, time in self._new.items() if now - time < _NEWS_SHOWN_S}
        hops = [_marked(hop, fresh) for hop in (last.hops if last else ())]
        lost = [hop for time, hop in self._lost.values() if now - time < _NEWS_SHOWN_S]
        for hop in lost:
            if now - self._lost[hop.peer_id][0] < _LOST_SHOWN_S and not is_last:
                hops = [each for each in hops if each.stop <= hop.start or each.start >= hop.stop]
                hops.append(hop)
        gone = {hop.peer_id for hop in lost}
        listed = [server for server in servers if server.peer_id not in gone]
        listed += [ServerPicture(hop.peer_id, hop.label, hop.start, hop.stop, "lost") for hop in lost]
        return PipelinePicture(
            model=model,
            num_blocks=num_blocks,
            hops=sorted(hops, key=lambda each: each.start),
            servers=listed,
            position=last.position + last.tokens if last else 0,
            tokens_per_s=self._rate(now),
            messages=[message for _, message in self._messages],
        )

    def _add_step(self, event: StepFinished) -> None:
        if event.owner.number != self._session:
            self._session, self._count = event.owner.number, 0
            self._steps.clear()
        self._count += 1
        step = StepPicture(
            number=self._count,
            position=event.position,
            tokens=event.tokens,
            total_ms=event.total_ms,
            hops=hop_pictures(event.hops),
            recovered=event.recovered,
        )
        self._steps.append((event.time, step))
        for hop in event.hops:
            self._lost.pop(hop.peer_id, None)  # it works again

    def _rate(self, now: float) -> float | None:
        """Tokens per second and row since the first of the last steps that was not the prompt's."""
        recent = [
            (time, step) for time, step in self._steps if now - time < _RATE_WINDOW_S and step.position > 0
        ]
        if not recent:
            return None
        (first_end, first), (end, last) = recent[0], recent[-1]
        seconds = end - first_end + first.total_ms / 1e3
        return (last.position + last.tokens - first.position) / seconds if seconds > 0 else None


def hop_pictures(hops: Sequence[HopTrace]) -> tuple[HopPicture, ...]:
    """The hops of a finished step."""
    return tuple(
        HopPicture(
            peer_id=hop.peer_id,
            label=hop.label,
            start=hop.start,
            stop=hop.stop,
            queue_ms=hop.queue_ms,
            compute_ms=hop.compute_ms,
            network_ms=hop.network_ms,
        )
        for hop in hops
    )


def _marked(hop: HopPicture, fresh: set[str]) -> HopPicture:
    if hop.peer_id not in fresh:
        return hop
    return HopPicture(
        hop.peer_id, hop.label, hop.start, hop.stop, hop.queue_ms, hop.compute_ms, hop.network_ms, "new"
    )
