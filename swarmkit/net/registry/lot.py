"""Drawing lots where there is more than can be looked at. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def draw(
    items: Sequence[Item], places_of: Callable[[Item], Collection[Hashable]], most: int, chance: random.Random
) -> list[Item]:
    """`most` of some items, drawn by lot, so that what crowds one place leaves the others theirs.

    Each place, such as a block, has an equal share of `most` for the items that are there. What room is left
    then goes to any of the others.

    Args: places_of: where an item is; one or several places.
    """
    if len(items) <= most:
        return list(items)
    open_places = {place for item in items for place in places_of(item)}
    share = max(1, most // max(1, len(open_places)))
    filled: Counter[Hashable] = Counter()
    kept: list[Item] = []
    rest: list[Item] = []
    for item in chance.sample(items, len(items)):
        places = places_of(item)
        if len(kept) == most or open_places.isdisjoint(places):
            rest.append(item)
            continue
        kept.append(item)
        filled.update(places)
        open_places.difference_update(place for place in places if filled[place] >= share)
    return kept + rest[: most - len(kept)]
