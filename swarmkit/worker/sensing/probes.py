"""Providers that are asked with a time limit, and may not know."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import SwarmkitError

T = TypeVar("T")

LIMIT_S = 2.0
"""How long a provider may take; after that its signal is not known."""
TRUSTED_S = 10.0
"""How long the absence of news is believed of what is asked again only when news has come."""
_PATIENCE_S = 0.1
"""A provider that has not answered by then does not keep the others waiting."""


class UnknownError(SwarmkitError):
    """A signal cannot be had here; says why, in words."""


class Probe(Generic[T]):
    """One signal. It is asked with `begin`, and answers with `value`.

    A provider that does not return is left alone in its thread, and not asked again before it has.

    Attributes:
        name: what is asked for, in words.
        note: why the signal is not known; empty where it is.
    """

    def __init__(self, name: str, read: Callable[[], T], clock: Clock = SYSTEM_CLOCK) -> None:
        self.name = name
        self.note = ""
        self._read = read
        self._clock = clock
        self._asked_at = 0.0
        self._done: threading.Event | None = None
        self._found: T | None = None
        self._why = ""

    def begin(self) -> None:
        """Ask, unless an earlier question is still open."""
        if question := self.open():
            threading.Thread(target=question, name=f"swarmkit-{self.name}", daemon=True).start()

    def open(self) -> Callable[[], None] | None:
        """Return what asks the provider, to be called in some thread; None: an earlier question is open."""
        if self._done is not None and not self._done.is_set():
            return None
        done = self._done = threading.Event()
        self._asked_at = self._clock.now()
        return lambda: self._run(done)

    def value(self, limit_s: float = LIMIT_S) -> T | None:
        """Return the answer to the latest question; None: it is not known."""
        assert self._done is not None
        left_s = max(0.0, limit_s - (self._clock.now() - self._asked_at))
        if not self._done.wait(left_s):
            self.note = f"{self.name}: no answer within {limit_s:g} s"
            return None
        self.note = f"{self.name}: {self._why}" if self._why else ""
        return self._found

    def _run(self, done: threading.Event) -> None:
        try:
            self._found, self._why = self._read(), ""
        except UnknownError as error:
            self._found, self._why = None, str(error)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one signal, the others go on
            self._found, self._why = None, f"{type(error).__name__}: {error}"
        finally:
            done.set()


def ask_all(probes: Iterable[Probe[object]]) -> None:
    """Begin with several. As a rule one thread asks all of them, for threads are what this costs."""
    questions = deque(question for probe in probes if (question := probe.open()) is not None)

    def ask() -> None:
        while True:
            try:
                question = questions.popleft()
            except IndexError:
                return
            question()

    while questions:
        thread = threading.Thread(target=ask, name="swarmkit-sensing", daemon=True)
        thread.start()
        thread.join(_PATIENCE_S)


def notes_of(*probes: Probe[object]) -> tuple[str, ...]:
    """Return why signals are not known, for those that are not."""
    return tuple(probe.note[:256] for probe in probes if probe.note)
