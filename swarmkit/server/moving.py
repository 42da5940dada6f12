"""How a server goes from the blocks that it serves to others, and who has to keep those that it leaves."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread

from swarmkit.errors import TransportError, UsageError
from swarmkit.events import MoveFailed, MoveStarted
from swarmkit.net.registry.records import Announcement
from swarmkit.placement.intentions import AnnouncedRun, Span, may_leave
from swarmkit.placement.move_protocol import is_turn
from swarmkit.server.block_run import BlockRun
from swarmkit.server.config import ServerConfig
from swarmkit.server.relocation import announced_runs

logger = logging.getLogger(__name__)


class BlockMoves:
    """Knows which run of blocks new sessions find at a server, and puts another one in its place."""

    def __init__(
        self,
        config: ServerConfig,
        peer_id: str,
        *,
        begin: Callable[[Span], Awaitable[BlockRun]],
        elsewhere: Callable[[], Awaitable[list[Announcement]]],
        is_stopping: Callable[[], bool],
        emit: Callable[..., None],
    ) -> None:
        """Make it; there is no run of blocks yet.

        Args:
            begin: loads blocks and announces them; returns when clients can use them.
            elsewhere: looks up the servers of other peers that are here, or are about to be.
            is_stopping: whether the server was told to stop.
            emit: has an event of some kind happen, with these values.
        """
        self._config = config
        self._peer_id = peer_id
        self._begin = begin
        self._elsewhere = elsewhere
        self._is_stopping = is_stopping
        self._emit: Callable[..., None] = emit
        self._moving = anyio.Lock()
        self.current: BlockRun | None = None

    async def move(self, blocks: Span, why: str, *, if_not_needed: bool) -> None:
        """See `ModelServer.move`."""
        self._config.check_blocks(blocks)
        async with self._moving:
            old = self.current
            if old is None or self._is_stopping():
                raise UsageError("this server does not serve (any more), so that it cannot move")
            held = old.serving.blocks
            if blocks == held:
                return
            beside = await anyio.to_thread.run_sync(self._config.fits_beside, held, blocks)
            try:
                await self._agree(old, blocks, beside, if_not_needed)
                self._emit(MoveStarted, *held, *blocks, why)
                try:
                    if beside:
                        self.current = await self._begin_beside(old, blocks, if_not_needed)
                    else:
                        del old  # so that its stage can go
                        await self._replace(blocks)
                except Exception as error:
                    self._emit(MoveFailed, *held, *blocks, str(error))
                    raise
            finally:
                await self.intend(None)

    async def intend(self, blocks: Span | None) -> None:
        """Tell the swarm where this server means to go, or that it means to stay.

        Raises:
            TransportError: nobody could be told of the intention.
        """
        run = self.current
        if run is None or run.told_to_leave.is_set() or run.moving_to == blocks:
            return
        run.moving_to = blocks
        try:
            if not await run.announcer.announce(moving_to=blocks) and blocks is not None:
                raise TransportError("no peer took the announcement of a move")
        except TransportError as error:
            if blocks is not None:
                raise
            logger.warning("could not announce that this server stays, its next words will tell: %s", error)

    async def is_needed(self, blocks: Span) -> bool:
        """Whether nobody else is sure to keep some blocks that this server leaves, as far as can be seen."""
        try:
            return may_leave(self._peer_id, blocks, None, await self._others()) != "go"
        except TransportError:
            return True

    async def _others(self) -> list[AnnouncedRun]:
        return announced_runs(await self._elsewhere())

    async def _notice(self) -> None:
        await anyio.sleep(self._config.settings.moving.move_notice_s)

    async def _agree(self, run: BlockRun, blocks: Span, beside: bool, if_not_needed: bool) -> None:
        """Tell that this server leaves its blocks, and see whether it may.

        Raises:
            UsageError: it is needed where it is.
        """
        is_known = run.moving_to == blocks
        await self.intend(blocks)
        if if_not_needed:
            if not is_known:
                await self._notice()
            await self._await_turn(run.serving.blocks, blocks, beside)

    async def _await_turn(self, held: Span, wanted: Span, beside: bool) -> None:
        """Return when this server may leave its blocks for others, which it may serve beside them.

        Raises:
            UsageError: it is needed where it is, or others who mean to leave go first.
        """
        if not await is_turn(
            self._peer_id,
            held,
            wanted if beside else None,
            self._others,
            self._notice,
            wanted=wanted,
            num_blocks=self._config.checkpoint.num_blocks,
        ):
            raise UsageError("nobody else is sure to keep some of these blocks, so that it stays")

    async def _begin_beside(self, old: BlockRun, blocks: Span, if_not_needed: bool) -> BlockRun:
        """Serve blocks beside others, and then have these drain."""
        new = await self._begin(blocks)
        if if_not_needed:
            try:
                await self._await_turn(old.serving.blocks, blocks, beside=True)
            except UsageError:
                new.leave(0.0, is_patient=True)
                raise
        old.leave(self._config.settings.node.drain_timeout_s, is_patient=True)
        return new

    async def _replace(self, blocks: Span) -> None:
        """Move where there is no room for both the old and the new blocks."""
        assert self.current is not None
        held, ended = self.current.serving.blocks, self.current.ended
        self.current.leave(self._config.settings.node.drain_timeout_s)
        await ended.wait()
        self.current = None
        try:
            self.current = await self._begin(blocks)
        except Exception:
            if not self._is_stopping():
                self.current = await self._begin(held)
            raise
