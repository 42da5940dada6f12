"""A session over a chain of servers that survives any of them; `step.py` has the picture of how."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import anyio
import torch

from swarmkit.client.adapters.model_adapters import ClientAdapter, ServerAdapter
from swarmkit.client.routing.route import Hop
from swarmkit.client.session.codecs import agree
from swarmkit.client.session.history import History
from swarmkit.client.session.replica import StepInputs
from swarmkit.client.session.restore_prefix import keep_prefix, restore_prefix
from swarmkit.client.session.second_opinion import offer_check
from swarmkit.client.session.session_route import RouteChanges, SessionRoute
from swarmkit.client.session.step import StepExecution
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import DeadlineError, SessionError
from swarmkit.events import StepFinished


class ChainSession:
    """Keys and values of `position` tokens, kept by servers; blocks [start, stop) of the model.

    One step at a time. `crop` and `reorder` take effect at once here, and on the servers with the next step.
    """

    def __init__(self, swarm: SwarmClient, max_length: int, start: int = 0, stop: int | None = None) -> None:
        self._swarm = swarm
        self._lock = anyio.Lock()
        self.owner = swarm.new_owner("session")
        """Names this session in events."""
        self._route = SessionRoute(
            swarm, self.owner, start, swarm.model.num_blocks if stop is None else stop, max_length
        )
        self._numbers = count(1)
        self._is_new = True
        """Whether servers may hold pages of this session's first tokens from an earlier one."""
        self._positions: torch.Tensor | None = None
        self._is_plain = swarm.prefix_cache.enabled
        """Whether later sessions can begin with this one: it has always had one row, no padding, the default
        positions, and servers that computed all of it, or the same as those whose places they took.
        """
        self._outputs = History()
        """The outputs of the last stage, as long as the session is plain."""
        self._inputs = History() if swarm.settings.transfer.codecs else None
        """The inputs as they came from the user, where codecs may have changed them; as long, too."""
        self.max_length = max_length
        self.adapter: ClientAdapter | ServerAdapter | None = None
        """The adapter of the blocks in all steps."""
        self.position = 0
        self.rows = 0
        self.latest: StepFinished | None = None

    @property
    def route(self) -> list[Hop]:
        """The servers in use, in order; empty before the first step."""
        return self._route.hops

    @property
    def history_bytes(self) -> int:
        """Bytes that are kept here so that any server can be replaced."""
        return sum(stage.history.nbytes for stage in self._route.stages)

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on."""
        if not 0 <= tokens <= self.position:
            raise SessionError(f"cannot keep {tokens} of {self.position} tokens")
        self.position = tokens
        for ends in filter(None, (self._inputs, self._outputs)):
            ends.crop(tokens)
        for stage in self._route.stages:
            stage.crop(tokens)

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row order[i] was; `order` may be longer or shorter than the batch."""
        if any(not 0 <= row < self.rows for row in order) or not order:
            raise SessionError(f"order {list(order)[:8]} does not name rows of a batch of {self.rows}")
        self.rows = len(order)
        if self._positions is not None:
            self._positions = self._positions[list(order)]
        for stage in self._route.stages:
            stage.reorder(order)

    def renew_adapter(self, adapter: ClientAdapter | ServerAdapter | None) -> None:
        """Have another object for the same adapter."""
        self.adapter = adapter
        self._route.adapter = adapter

    async def change_adapter(self, adapter: ClientAdapter | ServerAdapter | None) -> None:
        """Begin anew with another adapter; servers forget what they hold."""
        self._route.drop()
        self._route.stages = []
        self._is_plain = False
        self.renew_adapter(adapter)

    def close(self) -> None:
        """End the session; servers free what they hold. Call on the event loop's thread; never blocks."""
        swarm = self._swarm
        if not self._route.is_closed and self._is_plain and not self._lock.locked():
            keep_prefix(swarm.prefix_cache, self._route, self._outputs, self._inputs, self.position)
        self._route.close()

    async def step(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the session's blocks over new positions. A step that is cancelled stops at the servers too.

        Args:
            hidden: `[batch, tokens, hidden]`, on the CPU.
            mask: `[batch, position + tokens]`, uint8, 1 = attend; None = no padding.
            positions: `[batch, tokens]`, int64; None = position, position + 1, …

        Returns: `[batch, tokens, hidden]`, in the dtype of `hidden`.

        Raises:
            SessionError: the session is closed, or would become longer than `max_length`.
            NoRouteError: no server had some blocks for `route_timeout_s` seconds.
            RemoteError: the step is malformed, as all servers that could do it say.
            DeadlineError: it took longer than the client's `step_deadline_s`.
        """
        async with self._lock:
            try:
                return await self._step_in_time(hidden, mask, positions)
            finally:
                self._route.give_up_step()
                if self._route.is_closed:  # while the step was under way
                    self.close()

    async def _step_in_time(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        seconds = self._swarm.settings.deadlines.step_deadline_s
        if seconds is None:
            return await self._step(hidden, mask, positions)
        try:
            with anyio.fail_after(seconds):
                return await self._step(hidden, mask, positions)
        except DeadlineError:
            raise
        except TimeoutError:
            raise DeadlineError(
                f"a step was not done within the step_deadline_s of {seconds:g} s; try again, or allow more"
            ) from None

    async def _step(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        try:
            return await self._run(hidden, mask, positions)
        except anyio.get_cancelled_exc_class():
            for stage in self._route.stages:
                stage.abandon()
            raise

    async def _run(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        swarm, route = self._swarm, self._route
        route.check_open()
        rows, tokens, _ = hidden.shape
        if self.position and rows != self.rows:
            raise SessionError(f"the session holds {self.rows} rows, the step has {rows}")
        end = self.position + tokens
        if end > self.max_length:
            raise SessionError(
                f"{end} tokens are more than this session's max_length of {self.max_length}; "
                "open one with a larger max_length"
            )
        started = swarm.clock.now()
        all_positions = self._merged_positions(rows, end, positions)
        self._is_plain = self._is_plain and rows == 1 and mask is None and all_positions is None
        hosted_adapter = "" if self.adapter is None else self.adapter.hosted_name
        changes = RouteChanges(swarm, self.owner, self.position, rows * end, hosted_adapter, hidden)
        await route.prepare(changes)
        if swarm.settings.transfer.codecs:
            agree(swarm, route.stages, self._outputs, hidden)
        if self._is_plain and self._inputs is not None:
            self._inputs.write(self.position, hidden)
        restored = None
        if self._is_plain and self._is_new:
            restored = await restore_prefix(swarm.prefix_cache, hidden[0], route, self._outputs)
        self._is_new = False

        skipped = 0 if restored is None else restored.shape[1]
        changes.position += skipped
        inputs = StepInputs(changes.position, end, rows, mask, all_positions)
        execution = StepExecution(swarm, route, self._outputs, inputs, changes, self._numbers)
        output = await execution.run(hidden[:, skipped:])

        self._is_plain = self._is_plain and not changes.mixed
        if self._is_plain:
            self._outputs.write(changes.position, output)
        if not self.position:
            swarm.find_better_soon()
        self.position, self.rows, self._positions = end, rows, all_positions
        if changes.losses:
            route.tell_replacements(changes)
        self.latest = StepFinished(
            changes.position,
            rows,
            tokens - skipped,
            (swarm.clock.now() - started) * 1e3,
            tuple(execution.hops),
            not all(loss.busy for loss in changes.losses),
            skipped,
            time=swarm.clock.time(),
            owner=self.owner,
        )
        swarm.events.emit(self.latest)
        if (share := swarm.settings.checks.check_share) and swarm.chance() < share:
            offer_check(swarm, route, self._outputs if self._is_plain else output, inputs, self.owner)
        if restored is not None:
            output = torch.cat([restored.to(output.dtype), output], dim=1)
        return output.to(hidden.dtype)

    def _merged_positions(self, rows: int, end: int, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Position ids of the whole session `[batch, end]`, or None while they are the default ones."""
        if self.position == 0:
            return positions
        if positions is None and self._positions is None:
            return None
        default = torch.arange(end).expand(rows, -1)
        known = default if self._positions is None else self._positions
        new = default[:, self.position :] if positions is None else positions
        return torch.cat([known[:, : self.position], new], dim=1)

    def inputs(self) -> torch.Tensor:
        """What the session's blocks were given so far, [batch, position, hidden], for another session.

        Call on the event loop's thread. Where servers have kept the pages, the other session finds them.

        Raises:
            SessionError: the session keeps nothing to survive a lost server with.
        """
        if self._inputs is not None and self._is_plain:
            given = self._inputs.read(0, self.position)
        else:
            given = self._route.stages[0].history.read(0, self.position)
        if self._is_plain:
            cache = self._swarm.prefix_cache  # this session goes on, in the same buffers: hence a copy
            keep_prefix(cache, self._route, self._outputs, self._inputs, self.position, copy=True)
        return given.clone()

    @property
    def positions(self) -> torch.Tensor | None:
        """Position ids of the whole session [batch, position]; None while they are the default ones."""
        return self._positions
