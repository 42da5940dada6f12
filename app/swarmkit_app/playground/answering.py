"""From a visitor's wish to an answer: limits, the line of those who wait, and errors in plain words."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from swarmkit.api.engine import AnswerEngine, AnswerRequest
from swarmkit.api.refusals import from_failure
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import SwarmkitError
from swarmkit_app.playground.answers import AnswerProgress, AnswerRun
from swarmkit_app.playground.visitors import Allowance, Visitors
from swarmkit_app.playground.waiting_line import Ticket, WaitingLine

logger = logging.getLogger(__name__)

_LEFT = AnswerProgress("", None, "", is_wanted=False)


class Answering:
    """All answers of a page."""

    def __init__(
        self,
        engines: Mapping[str, AnswerEngine],
        line: WaitingLine,
        allowance: Allowance | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Prepare.

        Args:
            engines: what answers, by the name of the model.
            line: bounds how many answers run at a time.
            allowance: bounds how many answers a visitor may ask for; none if not given.
        """
        self.engines = engines
        self.visitors = Visitors()
        self.line = line
        self._allowance = allowance or Allowance(None)
        self._clock = clock

    async def answer(
        self,
        visitor: str,
        counted_as: str,
        part: str,
        model: str,
        make_request: Callable[[AnswerEngine], AnswerRequest],
        turn: int | None = None,
    ) -> AsyncGenerator[AnswerProgress, None]:
        """Tell an answer as it grows; what goes wrong is told as its summary, and never raised.

        Args:
            visitor: whose page it is; names one window.
            counted_as: whose allowance it counts for.
            part: which part of the page shows it. An answer that is under way there is ended first.
            turn: which click in the window asked for it, as in `Visitors.begin`.
        """
        seconds = self._allowance.wait_s(counted_as)
        if seconds > 0:
            message = "You have asked for as many answers as one visitor may within a minute"
            yield AnswerProgress("", None, f"⚠ {message}; ask again in {seconds:.0f} s.")
            return
        run = AnswerRun(self.engines[model], make_request, self._clock)
        shown = AnswerProgress("", None, "")
        try:
            await self.visitors.begin(visitor, part, run, turn)
            with self.line.join() as ticket:
                while (place := ticket.look()) and not run.stopped.is_set():
                    yield AnswerProgress("", None, _waiting(place))
                    await _moved(ticket, run)
                async with aclosing(run.progress()) as told:
                    async for shown in told:
                        if run.is_left:
                            break
                        yield shown
            if run.is_left:
                yield _LEFT
        except SwarmkitError as error:
            yield AnswerProgress(shown.text, None, f"⚠ {error}", shown.tokens)
        except Exception as error:
            logger.exception("an answer of the playground failed")
            yield AnswerProgress(shown.text, None, f"⚠ {from_failure(error)}", shown.tokens)
        finally:
            self.visitors.end(visitor, part, run)
            run.ended.set()


def _waiting(place: int) -> str:
    others = "nobody is" if place == 1 else "one other is" if place == 2 else f"{place - 1} others are"
    return f"You are number {place} in the line ({others} before you); the answer begins by itself."


async def _moved(ticket: Ticket, run: AnswerRun) -> None:
    """Wait until the place in the line may have changed, or the answer is not wanted any more."""
    waits = [asyncio.ensure_future(each.wait()) for each in (ticket.moved, run.stopped)]
    try:
        await asyncio.wait(waits, return_when="FIRST_COMPLETED")
    finally:
        for each in waits:
            each.cancel()
