"""Questions about single facts: every fact can be asked in every phrasing of its relation.

Held out are (fact, phrasing) pairs: the fact is trained in other phrasings, and the phrasing with other
facts, but never the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from swarmkit.tinychat.pool import Entry, entry, held_grid, rng_for
from tools.tinychat.facts import (
    ANIMALS,
    FOODS,
    JOBS,
    LANDS,
    PEOPLE,
    TOWNS,
    colour_of,
    food_of,
    friend_of,
    job_of,
    join_names,
    pet_of,
    town_of,
    with_article,
)


@dataclass(frozen=True)
class Relation:
    """Facts of one shape: ``rows`` are (subject, answer), ``phrasings`` have a ``{x}`` for the subject."""

    kind: str
    name: str
    rows: tuple[tuple[str, str], ...]
    phrasings: tuple[str, ...]


def _people() -> Iterator[Relation]:
    yield Relation(
        "people",
        "town",
        tuple((p.name, town_of(p)) for p in PEOPLE),
        (
            "Where does {x} live?",
            "Which town does {x} live in?",
            "What town is {x} from?",
            "Do you know where {x} lives?",
            "Can you tell me where {x} lives?",
            "Where is the home of {x}?",
            "In which town can I find {x}?",
            "Tell me where {x} lives.",
        ),
    )
    yield Relation(
        "people",
        "job",
        tuple((p.name, job_of(p)) for p in PEOPLE),
        (
            "What is {x}'s job?",
            "What does {x} do for a living?",
            "What is the job of {x}?",
            "Which job does {x} have?",
            "What does {x} work as?",
            "Can you tell me what {x} does for work?",
            "How does {x} earn a living?",
            "Tell me what job {x} has.",
        ),
    )
    yield Relation(
        "people",
        "colour",
        tuple((p.name, colour_of(p)) for p in PEOPLE),
        (
            "What is {x}'s favourite colour?",
            "What is the favourite colour of {x}?",
            "Which colour does {x} like best?",
            "What colour does {x} like?",
            "Do you know {x}'s favourite colour?",
            "Can you tell me which colour {x} likes most?",
            "Which colour is {x}'s favourite?",
            "Tell me the favourite colour of {x}.",
        ),
    )
    yield Relation(
        "people",
        "food",
        tuple((p.name, food_of(p)) for p in PEOPLE),
        (
            "What is {x}'s favourite food?",
            "What does {x} like to eat?",
            "Which food does {x} love?",
            "What is the favourite food of {x}?",
            "What should I cook for {x}?",
            "Do you know what {x} likes to eat?",
            "Which dish makes {x} happy?",
            "Tell me what food {x} loves.",
        ),
    )
    yield Relation(
        "people",
        "pet",
        tuple((p.name, pet_of(p)) for p in PEOPLE),
        (
            "What pet does {x} have?",
            "Does {x} have a pet?",
            "Which animal lives with {x}?",
            "What is the name of {x}'s pet?",
            "What is {x}'s pet called?",
            "Can you tell me about the pet of {x}?",
            "What kind of pet does {x} keep?",
            "Tell me about {x}'s pet.",
        ),
    )
    yield Relation(
        "people",
        "friend",
        tuple((p.name, friend_of(p)) for p in PEOPLE),
        (
            "Who is {x}'s best friend?",
            "Who is the best friend of {x}?",
            "Who does {x} like best?",
            "Do you know {x}'s best friend?",
            "Can you tell me who {x}'s best friend is?",
            "Which person is closest to {x}?",
            "Who is {x}'s closest friend?",
            "Tell me who is friends with {x}.",
        ),
    )
    yield Relation(
        "people",
        "who",
        tuple((p.job, f"{p.name} is the {p.job}.") for p in PEOPLE),
        (
            "Who is the {x}?",
            "Who works as the {x}?",
            "What is the name of the {x}?",
            "Do you know who the {x} is?",
            "What is the {x} called?",
            "Tell me who the {x} is.",
        ),
    )


def _places() -> Iterator[Relation]:
    yield Relation(
        "towns",
        "land",
        tuple((t.name, f"{t.name} is a town in {t.land}.") for t in TOWNS),
        (
            "Where is {x}?",
            "Which land is {x} in?",
            "In which land does {x} lie?",
            "Where can I find {x}?",
            "Do you know where {x} is?",
            "Can you tell me which land {x} belongs to?",
            "Tell me where {x} is.",
        ),
    )
    rows = tuple((t.name, f"The river {t.river} flows through {t.name}.") for t in TOWNS)
    yield Relation(
        "towns",
        "river",
        rows,
        (
            "Which river flows through {x}?",
            "What river is in {x}?",
            "What is the river of {x} called?",
            "Is there a river in {x}?",
            "Do you know the river of {x}?",
            "Tell me which river runs through {x}.",
        ),
    )
    yield Relation(
        "towns",
        "fame",
        tuple((t.name, f"{t.name} is famous for {t.fame}.") for t in TOWNS),
        (
            "What is {x} famous for?",
            "What is {x} known for?",
            "Why do people visit {x}?",
            "What is special about {x}?",
            "Why is {x} famous?",
            "Tell me what {x} is known for.",
        ),
    )
    names = {t.name: [p.name for p in PEOPLE if p.town == t.name] for t in TOWNS}
    yield Relation(
        "towns",
        "who",
        tuple((t, f"{join_names(n)} live in {t}.") for t, n in names.items()),
        (
            "Who lives in {x}?",
            "Who are the people of {x}?",
            "Which people live in {x}?",
            "Do you know anyone in {x}?",
            "Who can I meet in {x}?",
            "Tell me who lives in {x}.",
        ),
    )
    yield Relation(
        "towns",
        "capital",
        tuple((d.name, f"The capital of {d.name} is {d.capital}.") for d in LANDS),
        (
            "What is the capital of {x}?",
            "Which town is the capital of {x}?",
            "What is {x}'s capital?",
            "Do you know the capital of {x}?",
            "Can you name the capital of {x}?",
            "Tell me the capital of {x}.",
        ),
    )
    yield Relation(
        "towns",
        "flag",
        tuple((d.name, f"The flag of {d.name} is {d.flag}.") for d in LANDS),
        (
            "What colour is the flag of {x}?",
            "What does the flag of {x} look like?",
            "Which colour does {x}'s flag have?",
            "What is the colour of {x}'s flag?",
            "Do you know the flag of {x}?",
            "Tell me the colour of the flag of {x}.",
        ),
    )


def _animals() -> Iterator[Relation]:
    def a(name: str) -> str:
        return with_article(name)

    def cap(name: str) -> str:
        return with_article(name).capitalize()

    yield Relation(
        "animals",
        "sound",
        tuple((a(n.name), f"{cap(n.name)} says {n.sound}.") for n in ANIMALS),
        (
            "What does {x} say?",
            "What sound does {x} make?",
            "Which sound does {x} make?",
            "How does {x} sound?",
            "What noise does {x} make?",
            "Tell me what {x} says.",
        ),
    )
    yield Relation(
        "animals",
        "eats",
        tuple((a(n.name), f"{cap(n.name)} eats {n.eats}.") for n in ANIMALS),
        (
            "What does {x} eat?",
            "What food does {x} like?",
            "What should I feed {x}?",
            "What does {x} have for dinner?",
            "Do you know what {x} eats?",
            "Tell me what {x} eats.",
        ),
    )
    rows = tuple((a(n.name), f"{cap(n.name)} sleeps in the {n.home}.") for n in ANIMALS)
    yield Relation(
        "animals",
        "home",
        rows,
        (
            "Where does {x} sleep?",
            "Where is the home of {x}?",
            "What is the home of {x}?",
            "Where can I find {x}?",
            "Do you know where {x} sleeps?",
            "Tell me where {x} sleeps.",
        ),
    )
    yield Relation(
        "animals",
        "colour",
        tuple((a(n.name), f"{cap(n.name)} is {n.colour}.") for n in ANIMALS),
        (
            "What colour is {x}?",
            "Which colour does {x} have?",
            "What is the colour of {x}?",
            "Do you know the colour of {x}?",
            "Can you tell me what colour {x} is?",
            "Tell me the colour of {x}.",
        ),
    )
    yield Relation(
        "animals",
        "legs",
        tuple((a(n.name), f"{cap(n.name)} has {n.legs} legs.") for n in ANIMALS),
        (
            "How many legs does {x} have?",
            "How many legs has {x} got?",
            "What number of legs does {x} have?",
            "On how many legs does {x} walk?",
            "Do you know how many legs {x} has?",
            "Tell me how many legs {x} has.",
        ),
    )


def _jobs_and_foods() -> Iterator[Relation]:
    rows = tuple((with_article(j.name), f"{with_article(j.name).capitalize()} {j.does}.") for j in JOBS)
    yield Relation(
        "jobs",
        "does",
        rows,
        (
            "What does {x} do?",
            "What does {x} do all day?",
            "What is the work of {x}?",
            "Can you explain what {x} does?",
            "What is {x}?",
            "Tell me what {x} does.",
        ),
    )
    rows = tuple(
        (with_article(j.name), f"{with_article(j.name).capitalize()} needs {with_article(j.tool)}.")
        for j in JOBS
    )
    yield Relation(
        "jobs",
        "tool",
        rows,
        (
            "What tool does {x} use?",
            "What does {x} need?",
            "Which tool does {x} need?",
            "What does {x} work with?",
            "Which tool is important for {x}?",
            "Tell me which tool {x} uses.",
        ),
    )
    yield Relation(
        "foods",
        "made",
        tuple((f.name, f"{f.name.capitalize()} is made of {f.made_of}.") for f in FOODS),
        (
            "What is {x} made of?",
            "What is in {x}?",
            "What do I need to make {x}?",
            "How do I make {x}?",
            "Which things go into {x}?",
            "Tell me what {x} is made of.",
        ),
    )
    yield Relation(
        "foods",
        "taste",
        tuple((f.name, f"{f.name.capitalize()} tastes {f.taste}.") for f in FOODS),
        (
            "How does {x} taste?",
            "What does {x} taste like?",
            "What is the taste of {x}?",
            "Do you know how {x} tastes?",
            "Can you describe the taste of {x}?",
            "Tell me how {x} tastes.",
        ),
    )


RELATIONS: Final = (*_people(), *_places(), *_animals(), *_jobs_and_foods())


def fact_questions(seed: int) -> Iterator[Entry]:
    """Every (fact, phrasing) pair; one phrasing of every fact is held out."""
    for relation in RELATIONS:
        rng = rng_for(seed, f"{relation.kind}/{relation.name}")
        held = held_grid(len(relation.rows), len(relation.phrasings), rng)
        for row, (subject, answer) in enumerate(relation.rows):
            for column, phrasing in enumerate(relation.phrasings):
                yield entry(relation.kind, phrasing.format(x=subject), answer, (row, column) in held)
