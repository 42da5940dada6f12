"""One answer: its text as it grows, its speed, and a picture of its way through the swarm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from swarmkit.api.engine import AnswerEngine, AnswerRequest, PromptComputed
from swarmkit.api.rows import AnswerEnd, AnswerPiece
from swarmkit.client.pictures import server_pictures
from swarmkit.client.token_chances import TokenRecord
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.drawing.pipeline import pipeline_svg, slowest_part
from swarmkit.drawing.pipeline_log import PipelineLog
from swarmkit.drawing.values import PipelinePicture
from swarmkit.events import Event, Owner, Subscription

_SHOWN_EVERY_S = 0.12
_SLOW_TOKENS_PER_S = 1.0


@dataclass(frozen=True)
class AnswerProgress:
    """What the page shows of an answer at one moment.

    Attributes:
        drawing: the route and the servers, as SVG; None = as before.
        summary: the speed, and where the time goes, in plain words.
        tokens: the tokens so far with their probabilities, where the request asks for them.
        is_wanted: whether the page is to show this; the last progress of an answer that was left is not.
    """

    text: str
    drawing: str | None
    summary: str
    tokens: tuple[TokenRecord, ...] = ()
    is_wanted: bool = True


class AnswerRun:
    """An answer that is under way, which `stop` ends.

    Attributes:
        is_left: whether the page shows something else by now, so that nothing more of it is to be shown.
        ended: set once all of it has been told.
    """

    def __init__(
        self,
        engine: AnswerEngine,
        make_request: Callable[[AnswerEngine], AnswerRequest],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Prepare an answer.

        Args: make_request: called in a thread, as tokenizers take their time.
        """
        self._engine = engine
        self._make_request = make_request
        self._clock = clock
        self.stopped = asyncio.Event()
        self.is_left = False
        self.ended = asyncio.Event()
        self._log = PipelineLog()
        self._early: list[Event] = []
        self._owner: Owner | None = None
        self._text = ""
        self._tokens: list[TokenRecord] = []
        self._prompt_tokens = 0
        self._generated: int | None = None
        self._began = clock.now()
        self._first: float | None = None
        self._finish = ""

    def stop(self) -> None:
        """End the answer; what came until then stays. To be called on the event loop. May be called late."""
        self.stopped.set()

    def leave(self) -> None:
        """End the answer, and show nothing more of it."""
        self.is_left = True
        self.stopped.set()

    async def progress(self) -> AsyncGenerator[AnswerProgress, None]:
        """Tell the answer about eight times a second, and once at its end.

        Closing the iterator ends the answer, and frees what servers hold for it.

        Raises: what `model.generate()` raises, and `ApiError` for a prompt that is too long.
        """
        self._began = self._clock.now()
        request = await self._engine.in_thread(self._make_request, self._engine)
        self._prompt_tokens = len(request.prompt)
        with self._engine.model.subscribe(4096) as events:
            answer = self._engine.answer(request)
            stopped = asyncio.ensure_future(self.stopped.wait())
            piece: asyncio.Future[Any] | None = None
            shown = -_SHOWN_EVERY_S
            try:
                while not self.stopped.is_set():
                    piece = piece or asyncio.ensure_future(anext(answer, None))
                    await asyncio.wait(
                        {piece, stopped}, timeout=_SHOWN_EVERY_S, return_when="FIRST_COMPLETED"
                    )
                    if piece.done():
                        found, piece = piece.result(), None
                        if found is None:
                            break
                        self._take(found)
                    if self._clock.now() - shown >= _SHOWN_EVERY_S:
                        shown = self._clock.now()
                        yield self._now(events)
            finally:
                stopped.cancel()
                if piece is not None:
                    piece.cancel()
                    await asyncio.wait({piece})
                await answer.aclose()
            if self.stopped.is_set():
                self._finish = "stopped"
            yield self._now(events, is_last=True)

    def _take(self, event: PromptComputed | AnswerPiece | AnswerEnd) -> None:
        if isinstance(event, PromptComputed):
            self._owner = event.owner
            self._first = self._clock.now()
        elif isinstance(event, AnswerPiece):
            self._text += event.text
            self._tokens += event.tokens
        else:
            self._generated = event.generated
            self._finish = "cut at the longest length" if event.reason == "length" else ""

    def _now(self, events: Subscription, is_last: bool = False) -> AnswerProgress:
        self._early += events.pending()
        if self._owner is not None:  # until then it is unknown which session is the answer's
            for event in self._early:
                if event.owner == self._owner:
                    self._log.add(event)
            self._early.clear()
        client = self._engine.model.connection.client
        now = self._clock.time()
        servers = server_pictures(client.known.servers())
        picture = self._log.picture(client.model.name, client.model.num_blocks, servers, now, is_last)
        phase = (now % 1.2) / 1.2 if self._log.is_active(now) and not is_last else None
        drawing = pipeline_svg(picture, phase)
        return AnswerProgress(self._text, drawing, self._summary(picture), tuple(self._tokens))

    def _summary(self, picture: PipelinePicture) -> str:
        if self._first is None and self._finish:
            return f"The answer was {self._finish}."
        if self._first is None:
            return f"Waiting for the first token for {self._clock.now() - self._began:.1f} s."
        seconds = self._clock.now() - self._first
        tokens = self._generated
        if tokens is None:  # the last token is there, and has not gone through the swarm yet
            tokens = max(1, picture.position - self._prompt_tokens + 1)
        rate = (tokens - 1) / seconds if tokens > 1 and seconds > 0 else None
        speed = "" if rate is None else f", {rate:.1f} tokens/s"
        context = f"{self._prompt_tokens + tokens} of {self._engine.max_length} tokens of context are used."
        parts = [f"{tokens} tokens{speed}; the first after {self._first - self._began:.2f} s.", context]
        if self._finish:
            parts.append(f"The answer was {self._finish}.")
        if reason := slowest_part(picture.hops):
            parts.append(reason)
        if rate is not None and rate < _SLOW_TOKENS_PER_S:
            name = self._engine.model.connection.client.model.name
            parts.append(f"A further server would help: `swarmkit serve {name} --join ADDRESS`.")
        return " ".join(parts)
