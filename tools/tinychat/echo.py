"""Repeating words and numbers, which teaches the model to copy.

Copying is what remembering a name and restating a sum are made of, so this plain kind of question carries
the others. Held out are the sequences.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from swarmkit.tinychat.pool import Entry, entry, rng_for
from tools.tinychat.names import made_up_name

_ASK: Final = ("Say: {x}", "Repeat after me: {x}", "Please repeat: {x}", "Repeat this: {x}", "Copy this: {x}")


def _sequence(rng: random.Random, shortest: int) -> str:
    items = []
    for _ in range(rng.randint(shortest, 7)):
        name = made_up_name(rng)
        items.append(rng.choice((name, name.lower(), str(rng.randint(0, 99)), str(rng.randint(0, 49)))))
    return " ".join(items)


def repeat_held_out(seed: int) -> Iterator[Entry]:
    """Sequences of three and more items to repeat."""
    rng = rng_for(seed, "repeating")
    for _ in range(50):
        text = _sequence(rng, shortest=3)
        yield entry("repeating", rng.choice(_ASK).format(x=text), text, True)


def repeat_question(rng: random.Random, forbidden: frozenset[str]) -> Entry:
    """A fresh sequence to repeat that is not among the forbidden ones."""
    while (text := _sequence(rng, shortest=1)) in forbidden:
        pass
    return entry("repeating", rng.choice(_ASK).format(x=text), text, False)
