"""Work in a thread of its own: its result, its error, and its end by a signal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotDoneError
from typing import TypeVar

import pytest
import torch

from swarmkit.client.answer_thread import AnswerThread, StopSignal

from ..waiting import WITHIN

T = TypeVar("T")
TOKENS = torch.zeros(2, 3, dtype=torch.long)


def until_told(stop: StopSignal) -> str:
    while not bool(stop(TOKENS, None).all()):
        threading.Event().wait(0.001)
    return "stopped"


def started(work: Callable[[StopSignal], T], on_end: Callable[[], None] = lambda: None) -> AnswerThread[T]:
    thread = AnswerThread(work, on_end)
    thread.start()
    return thread


def test_the_work_gives_its_result() -> None:
    assert started(lambda stop: 6 * 7).result(WITHIN) == 42


def test_the_work_is_done_once_however_often_it_was_started() -> None:
    times: list[int] = []
    thread = started(lambda stop: times.append(1))
    thread.result(WITHIN)
    thread.start()
    thread.join(WITHIN)
    assert times == [1]


def test_the_error_of_the_work_is_raised_where_its_result_is_asked_for() -> None:
    thread = started(lambda stop: [][0])
    with pytest.raises(IndexError):
        thread.result(WITHIN)
    assert thread.has_failed


def test_the_signal_ends_every_row_of_an_answer() -> None:
    thread = started(until_told)
    with pytest.raises(NotDoneError):
        thread.result(0.02)
    assert not thread.done
    thread.stop.give()
    assert thread.result(WITHIN) == "stopped"


def test_the_end_is_told_when_the_result_is_there() -> None:
    ended, results = threading.Event(), []

    def on_end() -> None:
        results.append(thread.result(0))
        ended.set()

    begin = threading.Event()
    thread = started(lambda stop: begin.wait(WITHIN), on_end)
    begin.set()
    assert ended.wait(WITHIN)
    assert results == [True]
