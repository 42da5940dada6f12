"""`generate()` in a thread of its own, so that buttons and other cells work while an answer comes."""

from __future__ import annotations

from concurrent.futures import TimeoutError as NotDoneError
from typing import TYPE_CHECKING, Any

from swarmkit.client.answer_thread import AnswerThread, StopSignal
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM


class BackgroundAnswer:
    """An answer that is under way; made by `generate_in_background`."""

    def __init__(self, model: SwarmModelForCausalLM, inputs: dict[str, Any]) -> None:
        criteria = list(inputs.pop("stopping_criteria", None) or ())

        def work(stop: StopSignal) -> Any:
            return model.generate(**inputs, stopping_criteria=[*criteria, stop])

        self._answer = AnswerThread(work)

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

    def __repr__(self) -> str:
        state = "failed" if self._answer.has_failed else "done" if self.done else "under way"
        return f"<BackgroundAnswer: {state}>"


def generate_in_background(model: SwarmModelForCausalLM, **inputs: Any) -> BackgroundAnswer:
    """Start `model.generate(**inputs)` in a thread of its own, and return at once.

    The cell ends, so that the buttons of a view work while the answer comes::

        answer = generate_in_background(model, **tokenizer("Hello", return_tensors="pt"), max_new_tokens=200)
        answer.stop()
        tokenizer.decode(answer.result()[0])
    """
    return BackgroundAnswer(model, inputs)
