"""One client's session on this server, and the checks that a step must pass before it is received."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from swarmkit.errors import SwarmkitError
from swarmkit.models.execution.stage import StageCache
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import HIDDEN_DTYPES, Step
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.transport.shares import NOBODY, Holder
from swarmkit.server.adapters.service import check_rows
from swarmkit.server.adapters.store import Hold
from swarmkit.server.cache.kv_budget import CacheLease
from swarmkit.server.cache.prefix_tracker import PrefixTracker
from swarmkit.server.sessions.push import Downstream


class LateStepError(SwarmkitError):
    """A step was pushed here after its client had gone on without it."""


@dataclass(eq=False)
class ServedTokens:
    """How many positions (rows x tokens) were computed for a session; can be read when it has ended, too."""

    count: int = 0


@dataclass(eq=False)
class ServedSession:
    """A cache and the lease for it, used by one step at a time.

    Steps come from the client's own stream and from that of the server with the blocks before, so each takes
    its turn. What the session holds is given back when it has ended and no step uses it any more.
    """

    start: int
    stop: int
    max_length: int
    cache: StageCache
    lease: CacheLease
    opened_at: float
    """On the server's clock, as `used_at`."""
    trail: PrefixTracker | None = None
    """Where pages are kept and found; None where they cannot be."""
    adapter: Hold | None = None
    holder: Holder = NOBODY
    """The client, as it has a share of sessions and of their memory."""
    inlet: str = field(default_factory=lambda: secrets.token_hex(16))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    number: int = 0
    """Of the latest step."""
    steps: int = 0
    """How many were done or failed: a step that was checked before others ran must be checked again."""
    downstream: Downstream | None = None
    sources: set[anyio.CancelScope] = field(default_factory=set)
    """Around each stream that pushes steps into this session."""
    ended: bool = False
    served: ServedTokens = field(default_factory=ServedTokens)
    _leased: tuple[int, int] = (0, 0)
    """Rows and pages of the cache that the lease is for; (-1, -1) while it is for more."""
    used_at: float = field(init=False)
    """When it last did something."""

    def __post_init__(self) -> None:
        self.used_at = self.opened_at

    def link(self, downstream: Downstream | None) -> None:
        """Push outputs on to this server from now on, and to no other."""
        if self.downstream is not None:
            self.downstream.close()
        self.downstream = downstream

    @asynccontextmanager
    async def taking_turn(self) -> AsyncIterator[None]:
        """Use the session alone. If it ends meanwhile, what it held is given back at the end of the block."""
        async with self.turn:
            try:
                yield
            finally:
                if self.ended:
                    self._release()

    def end(self) -> None:
        """Give everything back; if a step has the turn, the cache is given back when that is over."""
        self.ended = True
        self.link(None)
        for source in self.sources:
            source.cancel()
        if not self.turn.locked():
            self._release()

    def _release(self) -> None:
        self.lease.release()
        if self.adapter is not None:
            self.adapter.release()

    def after_step(self, now: float) -> None:
        """A step was done, or failed: an edit may have shortened the cache, and a refused step has not
        lengthened it.
        """
        self.steps += 1
        self.used_at = now
        cache = self.cache
        if not self.ended and self._leased != (held := (cache.batch, cache.pages_held())):
            self.lease.resize(cache.batch, cache.tokens, held[1])
            self._leased = held

    def lease_for(self, step: Step) -> None:
        """Before a checked step: lease all that the cache may take until the step has been done.

        Raises:
            CacheFullError: there is not that much left.
        """
        rows, tokens, _ = step.hidden.shape
        end = step.position + tokens
        if self._leased[0] == rows == 1 and end <= self._leased[1] * PAGE_TOKENS:
            return  # the tokens go into a page that the only row has
        self.lease_pages(rows, end, self.cache.pages_after(step.position, step.order, rows, tokens))

    def lease_pages(self, rows: int, tokens: int, pages: int | None = None) -> None:
        """Lease what `rows` x `tokens` need, until a step has been done; see `CacheLease.grow`.

        Raises:
            CacheFullError: there is not that much left.
        """
        self._leased = -1, -1
        self.lease.grow(rows, tokens, pages)

    def audit(self) -> None:
        """Between two steps: raise AssertionError unless the lease is just what the cache takes."""
        cache, lease = self.cache, self.lease
        needed = 0 if lease.released else lease.needed(cache.batch, cache.tokens, cache.pages_held())
        if lease.nbytes != needed:
            raise AssertionError(f"{lease.nbytes} bytes are leased, the cache's pages are {needed}")
        if not lease.released and cache.nbytes() > lease.nbytes:
            raise AssertionError(f"a cache of {cache.nbytes()} bytes has leased {lease.nbytes}")


def check_step(
    session: ServedSession, step: Step, hidden_size: int, max_step_tokens: int, codecs: Collection[str] = ()
) -> None:
    """Everything that the header alone can tell, against what the session holds.

    Args: codecs: what hidden states may come and go in, besides `none`.

    Raises:
        Refusal: with the fault's code, and what was expected.
    """
    hidden = step.hidden
    if len(hidden.shape) != 3 or hidden.shape[2] != hidden_size or 0 in hidden.shape:
        raise Refusal(
            "bad_shape", f"hidden states must be [batch, tokens, {hidden_size}], got {list(hidden.shape)}"
        )
    if hidden.dtype not in HIDDEN_DTYPES:
        raise Refusal("bad_dtype", f"hidden states must be one of {HIDDEN_DTYPES}, not {hidden.dtype}")
    for codec in (hidden.codec, *step.answers[:1]):
        if codec != "none" and codec not in codecs:
            known = ", ".join(["none", *codecs])
            raise Refusal("bad_dtype", f"hidden states travel as {known} here, not as {codec}")
    rows, tokens, _ = hidden.shape
    if rows * tokens > max_step_tokens:
        raise Refusal(
            "too_large",
            f"{rows} x {tokens} tokens are more than the {max_step_tokens} of one step; send them in pieces",
        )
    check_place(session, step)
    if step.position + tokens > session.max_length:
        raise Refusal(
            "too_long",
            f"{step.position} + {tokens} tokens are more than the {session.max_length} "
            "that this session declared",
        )
    if step.keep > tokens:
        raise Refusal("bad_shape", f"{step.keep} outputs were asked for, but the step has {tokens} tokens")
    if step.forward and step.keep != tokens:
        raise Refusal(
            "bad_shape", f"a step that is forwarded keeps all of its {tokens} outputs, not {step.keep}"
        )
    check_plain(step.mask, "mask", "uint8", (rows, step.position + tokens))
    check_plain(step.positions, "positions", "int64", (rows, tokens))


def check_place(session: ServedSession, step: Step) -> None:
    """Check a step's position and rows against what the session holds now.

    Raises:
        Refusal: with the fault's code, and what was expected.
    """
    cache, rows = session.cache, step.hidden.shape[0]
    if step.position > cache.tokens:
        raise Refusal(
            "out_of_order", f"position {step.position} is beyond the {cache.tokens} tokens this session holds"
        )
    if not step.position:
        check_rows(session.adapter, rows)
        return
    expected_rows = cache.batch
    if step.order is not None:
        if not step.order or max(step.order) >= cache.batch:
            raise Refusal(
                "bad_value",
                f"order must name some of the {cache.batch} rows that this session holds, and no others",
            )
        expected_rows = len(step.order)
    if rows != expected_rows:
        raise Refusal("bad_shape", f"the step has {rows} rows, the session {expected_rows}")


def check_plain(spec: TensorSpec | None, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that goes with hidden states, such as a mask, unless it has this dtype and shape."""
    if spec is None:
        return
    if spec.shape != shape:
        raise Refusal("bad_shape", f"{name} must be {list(shape)}, got {list(spec.shape)}")
    if spec.dtype != dtype or spec.codec != "none":
        raise Refusal("bad_dtype", f"{name} must be plain {dtype}, not {spec.dtype} as {spec.codec}")
