"""What has happened in a client or a server, as values, and the stream that carries them.

Every event is a frozen value with a time and an owner. `str(event)` is one line for people, and
`event.to_json()` is one object for programs, in which `"event"` names the kind, such as `"peer_lost"`.

A reader takes a subscription, which holds a bounded number of events and drops the oldest when its reader is
slow. To emit an event appends it to a few queues and never waits, so that no reader can slow a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

import msgspec

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_KEPT = 256
_CAPACITY = 1024


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Owner(msgspec.Struct, frozen=True):
    """What an event happened to: one of the parts of a peer."""

    kind: Literal["client", "session", "training", "server", "worker"]
    peer_id: str
    """The peer that the part belongs to, and that tells the event."""
    number: int = 0
    """Tells the sessions of a client apart, or the calls of a training; 0 where there is one part only."""

    def __str__(self) -> str:
        return f"{self.kind} {self.number}" if self.number else self.kind


class Stamp(TypedDict):
    """What all events have, to be given as `**stamp`."""

    time: float
    owner: Owner


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=_snake_case):
    """Something that has happened."""

    time: float
    """Unix time in seconds."""
    owner: Owner

    def to_json(self) -> dict[str, Any]:
        """The event as plain values, with its line for people as `"message"`."""
        return {**msgspec.to_builtins(self), "message": str(self)}


# ---------------------------------------------------------------------- sessions and training


class HopTrace(msgspec.Struct, frozen=True):
    """One server's part of one step, in milliseconds.

    `network_ms` is the rest of the time that the client waited: both ways, encoding, and event loops. When
    the step arrived, `ahead` others were waiting, and the server expected it to wait `expected_wait_ms`.
    """

    peer_id: str
    label: str
    start: int
    stop: int
    queue_ms: float
    compute_ms: float
    network_ms: float
    sent_bytes: int = 0
    """Bytes of hidden states from the client; 0 where the server before handed them on, as it answered."""
    received_bytes: int = 0
    sent_codec: str = "none"
    received_codec: str = "none"
    ahead: int = 0
    expected_wait_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.compute_ms + self.network_ms


class StepFinished(Event, frozen=True):
    """A session has `tokens` new positions of `rows` rows, from `position` on."""

    position: int
    rows: int
    tokens: int
    total_ms: float
    hops: tuple[HopTrace, ...]
    recovered: bool = False
    """Whether a server was lost and replaced on the way."""
    restored: int = 0
    """Tokens before `position` that belong to the step but were not sent, because servers had kept them."""

    def __str__(self) -> str:
        return (
            f"{self.rows} x {self.tokens} tokens from position {self.position} on: {self.total_ms:.1f} ms "
            f"over {' → '.join(hop.label for hop in self.hops)}"
        )


class MicroBatchFinished(Event, frozen=True):
    """A micro-batch of full sequences went through blocks [start, stop), forward or backward."""

    direction: Literal["forward", "backward"]
    index: int
    """Its place among the micro-batches of one call."""
    start: int
    stop: int
    tokens: int
    """Rows x tokens."""
    total_ms: float
    """Since the call began to look for a server for it."""
    route: tuple[str, ...]
    """The servers that answered, in order, as label and blocks."""
    lost: int = 0
    """How many servers failed with it."""

    def __str__(self) -> str:
        return (
            f"micro-batch {self.index}, {self.direction} through blocks {self.start}:{self.stop}: "
            f"{self.tokens} tokens in {self.total_ms:.0f} ms over {' → '.join(self.route)}"
        )


class LogitsServed(Event, frozen=True):
    """A server computed the output layer for `rows` rows of a step of this client."""

    peer_id: str
    label: str
    rows: int
    top: int
    """How many logits of each row came, the largest ones; 0 = all of them."""
    total_ms: float
    compute_ms: float

    def __str__(self) -> str:
        what = f"the {self.top} largest logits" if self.top else "all logits"
        return f"{self.label} computed {what} of {self.rows} rows in {self.total_ms:.1f} ms"


class RoutePlanned(Event, frozen=True):
    """A session chose the servers that it starts with."""

    route: tuple[str, ...]

    def __str__(self) -> str:
        return "route: " + " → ".join(self.route)


class PeerLost(Event, frozen=True):
    """A server in use failed, or announced that it leaves."""

    peer_id: str
    label: str
    start: int
    stop: int
    reason: str

    def __str__(self) -> str:
        return f"lost {self.label} [{self.start}:{self.stop}]: {self.reason}"


class _BlocksTakenOver(Event, frozen=True):
    """Other servers serve the blocks of one that a session used, and now hold what it held."""

    peer_id: str
    label: str
    replaced_by: tuple[str, ...]
    """Peer ids."""
    route: tuple[str, ...]
    replayed_tokens: int
    stall_ms: float
    """From leaving the server to having the output of the replacement."""


class PeerReplaced(_BlocksTakenOver, frozen=True):
    """Other servers serve the blocks of a lost one, and now hold what it held."""

    def __str__(self) -> str:
        return (
            f"replaced {self.label} by {' → '.join(self.route)}: "
            f"replayed {self.replayed_tokens} tokens in {self.stall_ms:.0f} ms"
        )


class KeysHandedOver(Event, frozen=True):
    """A server that leaves has brought a session's keys and values to the one that takes its place."""

    peer_id: str
    label: str
    start: int
    stop: int
    to_peer_id: str
    to_label: str
    tokens: int
    """Of each row."""
    nbytes: int
    """As the server that leaves says."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.label} handed blocks {self.start}:{self.stop} of the session over to {self.to_label}: "
            f"{self.tokens} tokens, {self.nbytes / 1e6:.1f} MB in {self.seconds * 1e3:.0f} ms"
        )


class PeerRefused(Event, frozen=True):
    """A server works, but has no room; another one is used, or this one as soon as it has room again."""

    peer_id: str
    label: str
    start: int
    stop: int
    reason: str
    retry_after_s: float

    def __str__(self) -> str:
        return (
            f"{self.label} [{self.start}:{self.stop}] is busy for {self.retry_after_s:.1f} s: {self.reason}"
        )


class OutputsDiffered(Event, frozen=True):
    """Two servers computed outputs of blocks [start, stop) that honest servers cannot both compute."""

    peer_ids: tuple[str, str]
    labels: tuple[str, str]
    start: int
    stop: int
    excess: float
    """How far the outputs are apart, as a multiple of what rounding explains."""
    loser: str = ""
    """The peer id of the one that is left aside; empty where it is not known which of them is wrong."""

    def __str__(self) -> str:
        first, second = self.labels
        which = dict(zip(self.peer_ids, self.labels, strict=True)).get(self.loser)
        verdict = f"{which} is left aside" if which else "it is not known which of them is wrong"
        return (
            f"{first} and {second} differ in blocks {self.start}:{self.stop} by {self.excess:.1f} times what "
            f"rounding explains; {verdict}"
        )


class Rerouted(_BlocksTakenOver, frozen=True):
    """Other servers serve the blocks of a busy one, and now hold what it held."""

    def __str__(self) -> str:
        return (
            f"continued over {' → '.join(self.route)} in the place of {self.label}: "
            f"replayed {self.replayed_tokens} tokens in {self.stall_ms:.0f} ms"
        )


class WaitStarted(Event, frozen=True):
    """No server has some blocks, or every one that has them has failed lately or is busy; the owner waits."""

    missing: tuple[tuple[int, int], ...]
    seconds: float
    """The longest time that it will wait."""
    busy: bool = False

    def __str__(self) -> str:
        named = ", ".join(f"{low}:{high}" for low, high in self.missing)
        if self.busy:
            return f"all servers of blocks {named} are busy; waiting up to {self.seconds:.0f} s for room"
        return f"no server has blocks {named}; waiting up to {self.seconds:.0f} s for one to join"


# ---------------------------------------------------------------------- servers


class ServerJoined(Event, frozen=True):
    """A server reached the swarm."""

    addresses: tuple[str, ...]

    def __str__(self) -> str:
        return f"joined as {self.owner.peer_id}"


class LoadProgressed(Event, frozen=True):
    """Part of the weights of blocks [start, stop) is here: `fraction` of them, from 0 to 1."""

    start: int
    stop: int
    action: Literal["fetching", "loading"]
    fraction: float

    def __str__(self) -> str:
        return f"{self.action} blocks {self.start}:{self.stop}"


class BlocksLoaded(Event, frozen=True):
    """Blocks [start, stop) are in the device's memory."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"loaded blocks {self.start}:{self.stop}"


class StepCompiled(Event, frozen=True):
    """From now on, single tokens of `rows` sessions at once run through blocks [start, stop) as compiled
    steps.
    """

    start: int
    stop: int
    rows: int
    speedup: float
    """Seconds that such a step took without, in parts of what it takes now."""

    def __str__(self) -> str:
        sessions = f"{self.rows} session{'s' * (self.rows > 1)}"
        return f"tokens of {sessions} run through compiled steps, {self.speedup:.2f} times as fast"


class StepNotCompiled(Event, frozen=True):
    """Single tokens (of `rows` sessions at once, if a number is named) run without compiled steps."""

    start: int
    stop: int
    reason: str
    rows: int = 0

    def __str__(self) -> str:
        which = f"tokens of {self.rows} sessions run" if self.rows > 1 else "tokens run"
        return f"{which} without compiled steps: {self.reason}"


class AdapterHosted(Event, frozen=True):
    """A server offers an adapter to every client."""

    label: str
    digest: str

    def __str__(self) -> str:
        return f"hosting the adapter {self.label} ({self.digest[:12]}…)"


class ServingStarted(Event, frozen=True):
    """Clients can use blocks [start, stop) of a server."""

    start: int
    stop: int
    tokens_per_s: float
    model: str
    fingerprint: str
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        return f"serving blocks {self.start}:{self.stop} at {self.tokens_per_s:.0f} tokens/s"


class DrainStarted(Event, frozen=True):
    """A server takes no new sessions of blocks [start, stop), and waits until the open ones have moved."""

    start: int
    stop: int
    sessions: int

    def __str__(self) -> str:
        return f"leaving blocks {self.start}:{self.stop}; {self.sessions} sessions are moving away"


class MoveStarted(Event, frozen=True):
    """A server is about to serve blocks [start, stop) in the place of blocks [from_start, from_stop)."""

    from_start: int
    from_stop: int
    start: int
    stop: int
    reason: str

    def __str__(self) -> str:
        left = f"{self.from_start}:{self.from_stop}"
        return f"moving from blocks {left} to {self.start}:{self.stop}: {self.reason}"


class MoveFailed(Event, frozen=True):
    """A server could not serve other blocks, and goes on with those that it had."""

    from_start: int
    from_stop: int
    start: int
    stop: int
    reason: str

    def __str__(self) -> str:
        return (
            f"could not move to blocks {self.start}:{self.stop} ({self.reason}); "
            f"serving {self.from_start}:{self.from_stop} as before"
        )


class ServerLeft(Event, frozen=True):
    """A server has ended."""

    def __str__(self) -> str:
        return "stopped"


# ---------------------------------------------------------------------- the stream

E = TypeVar("E", bound=Event)


class EventStream:
    """Carries the events of one client or one server to its history and to all subscriptions."""

    def __init__(self, keep: int = _KEPT, apart: Mapping[type[Event], int] | None = None) -> None:
        """Make a stream.

        Args:
            keep: how many events the history holds.
            apart: kinds with a history of their own, and how many events it holds. Frequent ones belong here,
                so that they do not push out the others; they are not logged either.
        """
        self._history: deque[Event] = deque(maxlen=keep)
        self._apart: dict[type[Event], deque[Event]] = {
            kind: deque(maxlen=many) for kind, many in (apart or {}).items()
        }
        self._subscriptions: tuple[Subscription, ...] = ()
        self._changing = threading.Lock()

    def emit(self, event: Event) -> None:
        """Keep an event and hand it to all subscriptions; never waits and never raises.

        To be called by one thread at a time, such as the event loop's.
        """
        apart = self._apart.get(type(event))
        if apart is not None:
            apart.append(event)
        else:
            self._history.append(event)
            logger.debug("%s", event)
        for subscription in self._subscriptions:
            subscription._offer(event)

    @property
    def history(self) -> list[Event]:
        """The last events, oldest first, without the kinds that are kept apart."""
        return list(self._history)

    def kept(self, kind: type[E]) -> deque[E]:
        """The last events of a kind that is kept apart, oldest first."""
        return cast("deque[E]", self._apart[kind])

    def subscribe(self, capacity: int = _CAPACITY, *kinds: type[Event]) -> Subscription:
        """Have all events from now on, until the subscription is closed.

        Args:
            capacity: how many unread events it holds at most; then the oldest are dropped.
            kinds: only these; all if none is given.
        """
        subscription = Subscription(self, capacity, kinds)
        with self._changing:
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def close(self) -> None:
        """End all subscriptions, once their readers have read what they hold."""
        for subscription in self._subscriptions:
            subscription.close()

    def _forget(self, subscription: Subscription) -> None:
        with self._changing:
            self._subscriptions = tuple(each for each in self._subscriptions if each is not subscription)


class Subscription:
    """A bounded queue of events for one reader; a context manager, which closes it.

    A reader on an event loop iterates with `async for`, one in a thread of its own with `for`. Iteration ends
    when the subscription is closed and what it holds was read.
    """

    def __init__(self, stream: EventStream, capacity: int, kinds: tuple[type[Event], ...]) -> None:
        self._stream = stream
        self._kinds = kinds
        # One thread appends and one takes, each in one atomic call, so neither waits for the other.
        self._queue: deque[Event] = deque(maxlen=capacity)
        self._offered = 0
        self._taken = 0
        self._closed = False
        self._wake: Callable[[], object] | None = None

    @property
    def closed(self) -> bool:
        """Whether it gets no further events; what it holds can still be read."""
        return self._closed

    @property
    def dropped(self) -> int:
        """How many events were dropped because the reader was slow."""
        return max(0, self._offered - self._taken - len(self._queue))

    def pending(self) -> list[Event]:
        """Take all events that wait to be read; returns at once."""
        return list(iter(self._take, None))

    def get(self, timeout: float | None = None) -> Event | None:
        """Take the next event, waiting for it in this thread; None when closed or after `timeout` seconds."""
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wake = lambda: woken.put(None)
        while (event := self._take()) is None and not self._closed:
            try:
                woken.get(timeout=timeout)
            except queue.Empty:
                break
            self._wake = lambda: woken.put(None)
        self._wake = None
        return self._take() if event is None else event

    def close(self) -> None:
        """End the subscription; what it holds can still be read. May be called twice and in every thread."""
        self._closed = True
        self._stream._forget(self)
        self._notify()

    def __iter__(self) -> Iterator[Event]:
        while (event := self.get()) is not None:
            yield event

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        loop = asyncio.get_running_loop()
        while True:
            woken = asyncio.Event()
            self._wake = lambda woken=woken: loop.call_soon_threadsafe(woken.set)  # type: ignore[misc]
            closed = self._closed
            event = self._take()
            if event is not None:
                return event
            if closed:
                raise StopAsyncIteration
            await woken.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> Event | None:
        try:
            event = self._queue.popleft()
        except IndexError:
            return None
        self._taken += 1
        return event

    def _offer(self, event: Event) -> None:
        if self._kinds and not isinstance(event, self._kinds):
            return
        self._queue.append(event)
        self._offered += 1
        if self._wake is not None:
            self._notify()

    def _notify(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                wake()


@contextmanager
def following(stream: EventStream, act: Callable[[Event], object], *kinds: type[Event]) -> Iterator[None]:
    """Call `act` with every event of a stream, in a thread of its own, until the block is left.

    What `act` raises is logged. Events that were emitted inside the block have been acted on afterwards.
    """
    with stream.subscribe(_CAPACITY, *kinds) as subscription:

        def follow() -> None:
            for event in subscription:
                _act_on(event, act)

        thread = threading.Thread(target=follow, name="swarmkit-events")
        thread.start()
        try:
            yield
        finally:
            subscription.close()
            thread.join()


def _act_on(event: Event, act: Callable[[Event], object]) -> None:
    try:
        act(event)
    except Exception:
        logger.exception("a follower of events failed at: %s", event)
