"""Claims about people, right and wrong, to be answered with yes or no and the fact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from swarmkit.tinychat.pool import Entry, entry, held_grid, rng_for
from tools.tinychat.facts import PEOPLE, colour_of, food_of, job_of, town_of, with_article

_CLAIMS: Final = (
    ("town", town_of, ("Does {x} live in {v}?", "Is {x} from {v}?", "Is it true that {x} lives in {v}?")),
    ("job", job_of, ("Is {x} {v}?", "Does {x} work as {v}?", "Is it true that {x} is {v}?")),
    (
        "colour",
        colour_of,
        (
            "Is {x}'s favourite colour {v}?",
            "Does {x} like {v} best?",
            "Is it true that the favourite colour of {x} is {v}?",
        ),
    ),
    (
        "food",
        food_of,
        ("Does {x} love {v}?", "Is {x}'s favourite food {v}?", "Is it true that {x} loves {v}?"),
    ),
)


def yes_no_questions(seed: int) -> Iterator[Entry]:
    """Claims about people, right and wrong: "Yes, ..." or "No, ..." followed by the fact.

    Wrong claims are held out as whole (person, value) pairs, right ones as (person, phrasing) pairs, since
    a right claim never seen in any phrasing could only be answered by someone who knew the fact anyway.
    """
    for name, sentence, phrasings in _CLAIMS:
        rng = rng_for(seed, f"yes-no/{name}")
        values = sorted({getattr(person, name) for person in PEOPLE})
        right = held_grid(len(PEOPLE), len(phrasings), rng, every=3)
        for row, person in enumerate(PEOPLE):
            truth = getattr(person, name)
            wrong = rng.choice([value for value in values if value != truth])
            for value in values:
                said = with_article(value) if name == "job" else value
                fact = sentence(person)
                if fact.startswith("The "):
                    fact = fact[0].lower() + fact[1:]
                for column, phrasing in enumerate(phrasings):
                    held = (row, column) in right if value == truth else value == wrong
                    if held and value != truth and column != row % len(phrasings):
                        continue  # one phrasing of a held-out claim is enough; the others are just dropped
                    yield entry(
                        "yes or no",
                        phrasing.format(x=person.name, v=said),
                        f"{'Yes' if value == truth else 'No'}, {fact}",
                        held,
                    )
