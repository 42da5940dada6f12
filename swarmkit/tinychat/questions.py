"""Questions to ``tiny-chat``, and how its answers are judged.

``questions.json`` has the questions that were held out from training, and trained ones of a few kinds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

Message = dict[str, str]

FILE: Final = Path(__file__).parent / "questions.json"


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user asking, and the one answer that counts as right."""

    kind: str
    messages: tuple[Message, ...]
    answer: str


def held_out() -> list[Question]:
    """The questions that were kept out of training, at most 100 of each kind."""
    return list(_read()["held_out"])


def trained_questions() -> list[Question]:
    """Questions about people, towns, animals and jobs that ``tiny-chat`` was trained on."""
    return list(_read()["trained"])


@cache
def _read() -> dict[str, list[Question]]:
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: [Question(kind, tuple(messages), answer) for kind, messages, answer in questions]
        for name, questions in found.items()
    }


def accuracy(generate: Callable[[list[Message]], str], questions: Iterable[Question]) -> dict[str, float]:
    """The share of exact answers by kind of question; ``generate`` turns a conversation into a reply.

    >>> question = Question("echo", ({"role": "user", "content": "hi"},), "hi")
    >>> accuracy(lambda messages: messages[-1]["content"], [question])
    {'echo': 1.0}
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        right[question.kind].append(generate(list(question.messages)).strip() == question.answer)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}
