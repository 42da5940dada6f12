"""`generate()` in a thread of its own, so that buttons and other cells work while an answer comes."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import TimeoutError as NotDoneError
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from swarmkit.client.answer_thread import AnswerThread, StopSignal
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.notebook.views import PipelineView


class BackgroundAnswer:
    """An answer that is under way, once it was started; made by `generate_in_background`."""

    def __init__(
        self, model: SwarmModelForCausalLM, inputs: dict[str, Any], view: PipelineView | None = None
    ) -> None:
        if view is not None:
            inputs = view.follow_tokens(inputs)
        criteria = list(inputs.pop("stopping_criteria", None) or ())

        def work(stop: StopSignal) -> Any:
            return model.generate(**inputs, stopping_criteria=[*criteria, stop])

        self._answer = AnswerThread(work)

    def start(self) -> None:
        """Begin the answer, unless it has begun; to be called again by whoever was interrupted in it."""
        self._answer.start()

    @property
    def done(self) -> bool:
        """Whether the answer is complete, stopped, or has failed."""
        return self._answer.done

    def stop(self) -> None:
        """End the answer after the token that is under way; `result()` returns what came until then."""
        self._answer.stop.give()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, and return what `generate()` returned.

        Raises:
            UsageError: the answer is still under way after `timeout` seconds.
            Exception: what `generate()` raised.
        """
        try:
            return self._answer.result(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise
        except NotDoneError:
            if self._answer.done:  # by now, or it is what `generate()` raised
                return self._answer.result()
            raise UsageError(
                f"the answer is still under way after {timeout:g} s; wait longer, or stop() it"
            ) from None

    def __await__(self) -> Generator[Any, None, Any]:
        """What `generate()` returns; a task that is cancelled while it waits stops the answer."""
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        try:
            return await asyncio.to_thread(self.result)
        except asyncio.CancelledError:
            self.stop()
            raise

    def __repr__(self) -> str:
        state = "failed" if self._answer.has_failed else "done" if self.done else "under way"
        return f"<BackgroundAnswer: {state}>"


def generate_in_background(
    model: SwarmModelForCausalLM, *, view: PipelineView | None = None, **inputs: Any
) -> BackgroundAnswer:
    """Start `model.generate(**inputs)` in a thread of its own, and return at once.

    The cell ends, so that the buttons of a view work while the answer comes::

        answer = generate_in_background(model, **tokenizer("Hello", return_tensors="pt"), max_new_tokens=200)
        answer.stop()
        tokenizer.decode(answer.result()[0])     # or (await answer)[0]

    Args: view: shows the text, too, while it comes.
    """
    answer = BackgroundAnswer(model, inputs, view)
    answer.start()
    return answer


def generate_shown(model: SwarmModelForCausalLM, inputs: dict[str, Any], view: PipelineView | bool) -> Any:
    """What `model.generate(…, view=True)` does: show a view, generate, and return the answer at its end.

    An interrupt of the kernel ends the answer, and what came until then is returned.

    Args: view: the view that shows the text; True shows one of its own below the cell.
    """
    from swarmkit.notebook.views import PipelineView

    if view is not True and not isinstance(view, PipelineView):
        raise UsageError(f"give view=True, or the PipelineView that is to show the answer; not {view!r}")
    shown = view if isinstance(view, PipelineView) else PipelineView(model)
    if shown is not view:
        _display(shown)
    try:
        answer = BackgroundAnswer(model, inputs, shown)
        try:
            answer.start()
            return answer.result()
        except KeyboardInterrupt:
            answer.stop()
            answer.start()
            return answer.result()
    finally:
        if shown is not view:
            shown.stop()
            if not _in_notebook():
                tqdm.write(shown.summary)


def _display(view: PipelineView) -> None:
    if _in_notebook():
        from IPython.display import display

        display(view)


def _in_notebook() -> bool:
    """Whether the program runs in a kernel, which shows widgets."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
