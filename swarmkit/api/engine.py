"""The one call behind every endpoint: `model.generate()` in a thread, told piece by piece to the event loop.

A request has a session of its own. Ending it, as a client that closes its connection does, closes the
session: the step under way stops at the servers, and they free its pages. A conversation that goes on
begins like the session before it, of which servers keep the pages, so that only what is new is computed.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor
from transformers.generation import BaseStreamer

from swarmkit.api.chances import prompt_records
from swarmkit.api.refusals import ApiError
from swarmkit.api.rows import AnswerEnd, AnswerPiece, AnswerRow
from swarmkit.api.sampling import Sampling, config_for, processors_for
from swarmkit.client.answer_thread import AnswerThread, StopSignal
from swarmkit.client.speculation.assistants import Speculation
from swarmkit.client.token_chances import ChanceRecorder, TokenRecord
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.events import Owner

if TYPE_CHECKING:
    from swarmkit.api.metrics import ApiMetrics
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.client.session.session import Session

MakeConstraint = Callable[[], LogitsProcessor]

_END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class AnswerRequest:
    """What is to be answered.

    Attributes:
        prompt: token ids.
        max_tokens: of each answer; 0 computes the prompt alone.
        answers: how many.
        stops: strings that end an answer.
        logprobs: how many of the likeliest tokens are told at each place; None = tell no probabilities.
        prompt_logprobs: the same for the tokens of the prompt.
        keep_special: whether special tokens are part of the text, for a parser that looks for them.
        speculation: how draft tokens are made; as the client's settings say if None.
        constraint: makes what forbids tokens that may not come next; called in the thread of the request.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    answers: int = 1
    stops: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    keep_special: bool = False
    constraint: MakeConstraint | None = None
    speculation: Speculation | None = None


@dataclass(frozen=True)
class PromptComputed:
    """The prompt went through the model, and the first token is there.

    Attributes:
        cached: tokens of the prompt that servers held already.
        owner: the session that computes the answer, as its events name it.
        records: the prompt's tokens from the second on, where their probabilities were asked for.
    """

    cached: int = 0
    owner: Owner | None = None
    records: tuple[TokenRecord, ...] = ()


AnswerEvent = PromptComputed | AnswerPiece | AnswerEnd


class AnswerEngine:
    """Answers requests with one model, each in a thread; the caller bounds how many run at a time."""

    def __init__(
        self,
        model: SwarmModelForCausalLM,
        metrics: ApiMetrics | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Make an engine. `close` ends its threads.

        Args: metrics: count tokens, and measure times between them.
        """
        self.model = model
        self._metrics = metrics
        self._clock = clock
        self.tokenizer: Any = model.tokenizer()
        self._running: dict[_AnswerJob, AnswerThread[None]] = {}
        self.ends = _ends_of(model)
        """The tokens that end an answer."""
        session = model.session()
        self.max_length = session.max_length
        """Tokens that prompt and answer may have together, but for the last one."""
        session.close()

    async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerEvent, None]:
        """Tell an answer while it grows. Closing the iterator ends it, and frees what servers hold for it.

        Raises: what `model.generate()` raises.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[AnswerEvent | None] = asyncio.Queue()

        def tell(event: AnswerEvent | None) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop has ended, and with it whoever listened
                job.cancel()

        job = _AnswerJob(self.model, self.tokenizer, self.ends, request, tell)
        thread = AnswerThread(job.run, on_end=lambda: tell(None))
        self._running = {other: its for other, its in self._running.items() if not its.done} | {job: thread}
        thread.start()
        try:
            told = self._clock.now()
            while (event := await events.get()) is not None:
                told = self._measure(event, len(request.prompt), told)
                yield event
            thread.result()
        finally:
            thread.stop.give()
            job.cancel()

    def _measure(self, event: AnswerEvent, prompt_tokens: int, before: float) -> float:
        now = self._clock.now()
        metrics = self._metrics
        if metrics is None:
            return now
        if isinstance(event, PromptComputed):
            metrics.first_token.observe(now - before)
            metrics.prompt_tokens.inc(prompt_tokens)
            metrics.cached_tokens.inc(event.cached)
        elif isinstance(event, AnswerPiece):
            metrics.between_tokens.observe(now - before)
        else:
            metrics.generated_tokens.inc(event.generated)
        return now

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function that takes long, such as a tokenizer, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)

    def close(self) -> None:
        """End all answers, and wait for their threads."""
        for job, thread in self._running.items():
            thread.stop.give()
            job.cancel()
        for thread in self._running.values():
            thread.join(_END_TIMEOUT_S)


class _AnswerJob(BaseStreamer):
    """One request in its thread; transformers' streamer, which sees each token as it is made."""

    takes_several = True

    def __init__(
        self,
        model: SwarmModelForCausalLM,
        tokenizer: Any,
        ends: frozenset[int],
        request: AnswerRequest,
        tell: Callable[[AnswerEvent | None], None],
    ) -> None:
        self._model = model
        self._request = request
        self._tell = tell
        self._stop = StopSignal()
        self._is_cancelled = False
        self._session: Session | None = None
        self._prompt_records: tuple[TokenRecord, ...] = ()
        self._position = 0
        self._has_seen_prompt = False
        self._has_told_prompt = False

        def decode(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=not request.keep_special))

        def decode_whole(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(tokens))

        self._decode = decode_whole
        count = request.logprobs
        self._recorder = None if count is None else ChanceRecorder(count, decode_whole)
        self._rows = [AnswerRow(row, decode, ends, request.stops, tell) for row in range(request.answers)]
        self._ends = ends

    def cancel(self) -> None:
        """End the session, from another thread, after the signal to stop. May be called late.

        The step under way ends at once on the servers, and soon here.
        """
        self._is_cancelled = True
        session = self._session
        if session is not None:
            session.close()

    def run(self, stop: StopSignal) -> None:
        """Answer, in this thread, until the end."""
        self._stop = stop
        try:
            if self._request.prompt_logprobs is not None:
                self._compute_prompt(self._request.prompt_logprobs)
            if self._request.max_tokens:
                self._generate()
            else:
                self._tell_prompt()
            for row in self._rows:
                row.finish()
        except Exception:
            if not self._is_cancelled:  # else its session was closed under it, as was meant
                raise

    def _open_session(self) -> Session:
        self._session = session = self._model.session()
        if self._is_cancelled:
            session.close()
        return session

    def _compute_prompt(self, count: int) -> None:
        session = self._open_session()
        try:
            found = prompt_records(self._model, session, self._request.prompt, count, self._decode)
        finally:
            session.close()
        self._prompt_records = tuple(found)

    def _generate(self) -> None:
        request = self._request
        prompt = torch.tensor([list(request.prompt)] * request.answers, device=self._model.device)
        self._position = prompt.shape[1]
        constraint = None if request.constraint is None else request.constraint()
        processors = processors_for(request.sampling, prompt.shape[1], constraint)
        options: dict[str, Any] = {"speculation": request.speculation}
        if self._recorder is not None:
            processors.insert(0, self._recorder)
        if constraint is not None or self._recorder is not None:
            options["speculation"] = "off"  # both follow the tokens one by one
        if processors:
            options["logits_processor"] = processors
        session = self._open_session()
        try:
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                session=session,
                generation_config=config_for(self._model.generation_config, self._ends, request.max_tokens),
                streamer=self,
                stopping_criteria=[self._stop],
                **options,
            )
        finally:
            session.close()

    # ------------------------------------------------------------------ transformers' streamer

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, and then tokens: one for each row, or several for the only one."""
        if not self._has_seen_prompt:
            self._has_seen_prompt = True
            return
        self._tell_prompt()
        tokens = value.reshape(-1).tolist()
        steps = [tokens] if len(self._rows) > 1 else [[token] for token in tokens]
        for step in steps:
            self._take(step)
        if all(row.is_done for row in self._rows):
            self._stop.give()

    def end(self) -> None:
        """Nothing is held back here."""

    def _tell_prompt(self) -> None:
        if not self._has_told_prompt:
            self._has_told_prompt = True
            step = None if self._session is None else self._session.chain.latest
            owner = None if self._session is None else self._session.chain.owner
            restored = 0 if step is None else step.restored
            self._tell(PromptComputed(restored, owner, self._prompt_records))

    def _take(self, tokens: list[int]) -> None:
        found: Sequence[TokenRecord | None] = [None] * len(tokens)
        if self._recorder is not None:
            found = self._recorder.take(self._position, tokens)
        self._position += 1
        for row, token, record in zip(self._rows, tokens, found, strict=True):
            row.add(token, record)


def _ends_of(model: SwarmModelForCausalLM) -> frozenset[int]:
    """The tokens that end an answer."""
    config = model.generation_config
    given = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    if given is None:
        return frozenset()
    return frozenset(given if isinstance(given, list | tuple) else [given])


def new_seed() -> int:
    """A seed for a request that gives none."""
    return secrets.randbits(48)


def answer_room(engine: AnswerEngine, prompt: Sequence[int], param: str) -> int:
    """How many tokens an answer to a prompt can have.

    Raises:
        ApiError: the prompt is empty, or fills the model's context alone.
    """
    if not prompt:
        raise ApiError(400, "the prompt is empty", param=param, code="invalid_value")
    room = engine.max_length - len(prompt) + 1
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, and this model takes {engine.max_length} at most",
            param=param,
            code="context_length_exceeded",
        )
    return room
