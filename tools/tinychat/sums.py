"""Small arithmetic: adding, subtracting, multiplying, comparing and counting.

Held out are operand pairs. A pair held out from adding is held out in both orders. In multiplying there
are so few pairs that the mirror image stays in training: 7 times 8 may be held out while 8 times 7 is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from swarmkit.tinychat.pool import Entry, entry, held_sample, rng_for

LARGEST: Final = 49
LARGEST_FACTOR: Final = 12
LARGEST_COUNT: Final = 40

_ADD: Final = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "{a} + {b}",
    "Can you add {a} and {b}?",
)
_SUBTRACT: Final = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} minus {b}?",
    "Take {b} away from {a}.",
    "{a} - {b}",
    "Can you subtract {b} from {a}?",
)
_MULTIPLY: Final = (
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "How much is {a} times {b}?",
    "Multiply {a} by {b}.",
    "{a} * {b}",
    "Can you multiply {a} by {b}?",
)
_COMPARE: Final = (
    "Which is bigger, {a} or {b}?",
    "Which number is larger, {a} or {b}?",
    "What is more, {a} or {b}?",
)
_COUNT: Final = (
    "Count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Please count from {a} up to {b}.",
)


def sum_questions(seed: int) -> Iterator[Entry]:
    """All sums of the world, each in every phrasing."""
    numbers = range(LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers]

    held = held_sample([(a, b) for a, b in pairs if a <= b], 100, rng_for(seed, "add"))
    for a, b in pairs:
        out = (min(a, b), max(a, b)) in held
        yield from _phrased("addition", _ADD, a, b, f"{a} plus {b} is {a + b}.", out)

    differences = [(a, b) for a, b in pairs if b <= a]
    held = held_sample(differences, 100, rng_for(seed, "subtract"))
    for a, b in differences:
        yield from _phrased("subtraction", _SUBTRACT, a, b, f"{a} minus {b} is {a - b}.", (a, b) in held)

    factors = range(LARGEST_FACTOR + 1)
    held = held_sample([(a, b) for a in factors for b in factors if a < b], 20, rng_for(seed, "multiply"))
    for a in factors:
        for b in factors:
            yield from _phrased(
                "multiplication", _MULTIPLY, a, b, f"{a} times {b} is {a * b}.", (a, b) in held
            )

    held = held_sample([(a, b) for a, b in pairs if a < b], 60, rng_for(seed, "compare"))
    for a, b in pairs:
        if a != b:
            out = (min(a, b), max(a, b)) in held
            answer = f"{max(a, b)} is bigger than {min(a, b)}."
            yield from _phrased("comparing", _COMPARE, a, b, answer, out)

    spans = [(a, b) for a in range(LARGEST_COUNT) for b in range(a + 3, min(a + 20, LARGEST_COUNT) + 1)]
    held = held_sample(spans, 60, rng_for(seed, "count"))
    for a, b in spans:
        answer = ", ".join(str(number) for number in range(a, b + 1)) + "."
        yield from _phrased("counting", _COUNT, a, b, answer, (a, b) in held)


def _phrased(
    kind: str, phrasings: tuple[str, ...], a: int, b: int, answer: str, out: bool
) -> Iterator[Entry]:
    for phrasing in phrasings:
        yield entry(kind, phrasing.format(a=a, b=b), answer, out)
