"""`generate()` in a thread of its own, which any other thread may stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
from transformers import StoppingCriteria

T = TypeVar("T")


class StopSignal(StoppingCriteria):
    """Ends `generate()` after the step that is under way, once any thread has given the signal."""

    takes_several = True
    """It does not mind being asked after several tokens at once, so that tokens may be drafted ahead."""

    def __init__(self) -> None:
        self._given = threading.Event()

    @property
    def is_given(self) -> bool:
        """Whether the answer is to end."""
        return self._given.is_set()

    def give(self) -> None:
        """End the answer. May be called several times, and late."""
        self._given.set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._given.is_set(), device=input_ids.device)


class AnswerThread(Generic[T]):
    """Work that makes an answer, in a thread that `start` begins and that ends with the work.

    Attributes:
        stop: what was handed to the work, which hands it on to `generate()`.
    """

    def __init__(self, work: Callable[[StopSignal], T], on_end: Callable[[], None] = lambda: None) -> None:
        """Prepare the work. `start` begins it.

        Args: on_end: called in the thread when the result is there.
        """
        self.stop = StopSignal()
        self._work = work
        self._on_end = on_end
        self._outcome: Future[T] = Future()
        self._claim = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin the work, unless it has begun.

        Whoever was interrupted in this call cannot know whether the thread runs, and calls it once more.
        """
        self._thread = threading.Thread(target=self._run, name="swarmkit-answer", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the work has ended, or failed."""
        return self._outcome.done()

    @property
    def has_failed(self) -> bool:
        """Whether the work has raised an error."""
        return self.done and self._outcome.exception() is not None

    def result(self, timeout: float | None = None) -> T:
        """Wait for the end, and return what the work returned.

        Raises:
            TimeoutError: the work has not ended after `timeout` seconds.
            Exception: what the work raised.
        """
        return self._outcome.result(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return  # another start has begun the work
        # torch learns how many threads it may use in each thread at its first parallel loop; matrix products
        # before that would use another number, and differ in their last bits from all later ones.
        torch.get_num_threads()
        try:
            value = self._work(self.stop)
        except BaseException as error:  # noqa: BLE001 - raised by result()
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(value)
        self._on_end()
