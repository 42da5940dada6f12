"""`generate()` in a thread of its own, so that buttons and other cells work while an answer comes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM


class BackgroundAnswer:
    """An answer that is under way; made by `generate_in_background`."""

    def __init__(self, model: SwarmModelForCausalLM, inputs: dict[str, Any]) -> None:
        self._stop = _StopWhenTold()
        self._output: Any = None
        self._error: BaseException | None = None
        criteria = [*(inputs.pop("stopping_criteria", None) or ()), self._stop]
        self._thread = threading.Thread(
            target=self._run,
            args=(model, {**inputs, "stopping_criteria": criteria}),
            name="swarmkit-answer",
            daemon=True,
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the answer is complete, stopped, or has failed."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End the answer after the token that is under way; `result()` returns what came until then."""
        self._stop.told.set()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, and return what `generate()` returned.

        Raises:
            UsageError: the answer is still under way after `timeout` seconds.
            Exception: what `generate()` raised.
        """
        try:
            self._thread.join(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise
        if self._thread.is_alive():
            raise UsageError(f"the answer is still under way after {timeout:g} s; wait longer, or stop() it")
        if self._error is not None:
            raise self._error
        return self._output

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self.done else "under way"
        return f"<BackgroundAnswer: {state}>"

    def _run(self, model: SwarmModelForCausalLM, inputs: dict[str, Any]) -> None:
        try:
            self._output = model.generate(**inputs)
        except BaseException as error:  # noqa: BLE001 - handed to the caller of result()
            self._error = error


def generate_in_background(model: SwarmModelForCausalLM, **inputs: Any) -> BackgroundAnswer:
    """Start `model.generate(**inputs)` in a thread of its own, and return at once.

    The cell ends, so that the buttons of a view work while the answer comes::

        answer = generate_in_background(model, **tokenizer("Hello", return_tensors="pt"), max_new_tokens=200)
        answer.stop()
        tokenizer.decode(answer.result()[0])
    """
    return BackgroundAnswer(model, inputs)


class _StopWhenTold(StoppingCriteria):
    def __init__(self) -> None:
        self.told = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.told.is_set(), device=input_ids.device)
