"""What every part of the world hands out: a question with its answer, marked as trained or held out.

A *pool* is a finite list of entries. Splitting happens inside the pools, in one of two ways: a *grid* holds
out some (row, column) pairs while every row and every column stays in training, and a *sample* holds out
whole items.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from swarmkit.tinychat.questions import Message, Question

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A question in a pool. ``held_out`` says on which side of the split it lies."""

    question: Question
    held_out: bool


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for long lists of names."""
    return tuple(text.split())


def user(text: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """A system turn."""
    return {"role": "system", "content": text}


def entry(kind: str, text: str, answer: str, held_out: bool) -> Entry:
    """A pool entry of one user turn."""
    return Entry(Question(kind, (user(text),), answer), held_out)


def rng_for(seed: int, name: str) -> random.Random:
    """A random stream of its own per name, so that a change to one pool leaves the others as they were."""
    return random.Random(f"tiny-chat:{seed}:{name}")


def held_grid(rows: int, columns: int, rng: random.Random, every: int = 1) -> set[tuple[int, int]]:
    """Pick one column for every ``every``-th row, spread evenly, so no row or column is lost to training."""
    row_order = rng.sample(range(rows), rows)
    column_order = rng.sample(range(columns), columns)
    return {(row, column_order[rank % columns]) for rank, row in enumerate(row_order[::every])}


def held_sample(items: Sequence[T], count: int, rng: random.Random) -> set[T]:
    """Pick ``count`` whole items to hold out."""
    return set(rng.sample(list(items), count))
