"""Who decides where virtual servers serve: our rule, that of Petals, or a plan made for all."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

from swarmkit.placement import petals
from swarmkit.placement.choice import PlacementPolicy, choose
from swarmkit.placement.description import Demand, Machine, ModelSize, Served, blocks_that_fit
from swarmkit.placement.together import PlacementMover


class PlacementRule(Protocol):
    """Decides for one server, which sees what the others announce."""

    def choose(self, machine: Machine, others: Sequence[Served]) -> tuple[int, int]:
        """The blocks that a newcomer serves."""

    def better(
        self, machine: Machine, own: Served, others: Sequence[Served], move_s: float
    ) -> tuple[int, int] | None:
        """The blocks that a server moves to, if it does."""


_Sight = tuple[Machine, Served, tuple[Served, ...], float]


class OurRule:
    """`swarmkit.placement.choice`, and `swarmkit.placement.together` for moves."""

    def __init__(
        self, model: ModelSize, demand: Demand | None = None, policy: PlacementPolicy | None = None
    ) -> None:
        self._model, self._demand, self._policy = model, demand or Demand(), policy or PlacementPolicy()
        self._movers: defaultdict[str, PlacementMover] = defaultdict(PlacementMover)
        self._latest: dict[str, tuple[_Sight, tuple[int, int] | None]] = {}
        """What each server saw and decided at its latest look."""

    def choose(self, machine: Machine, others: Sequence[Served]) -> tuple[int, int]:
        return choose(machine, others, self._model, self._demand, self._policy)

    def better(
        self, machine: Machine, own: Served, others: Sequence[Served], move_s: float
    ) -> tuple[int, int] | None:
        sight = machine, own, tuple(others), move_s
        # Where the demand is known, nothing is remembered, and who sees the same decides the same.
        if self._demand.arrivals_per_s and self._latest.get(machine.name, (None,))[0] == sight:
            return self._latest[machine.name][1]
        move = self._movers[machine.name].better_place(
            machine, own, others, self._model, self._demand, self._policy, move_s=move_s
        )
        found = None if move is None else (move.start, move.stop)
        self._latest[machine.name] = sight, found
        return found


class PetalsRule:
    """`swarmkit.placement.petals`: as many blocks as fit beside the cache of one long session."""

    def __init__(
        self,
        model: ModelSize,
        chance: random.Random,
        *,
        cache_tokens: float = 4096,
        balance_quality: float = petals.BALANCE_QUALITY,
    ) -> None:
        self._model, self._chance = model, chance
        self._cache_tokens, self._quality = cache_tokens, balance_quality

    def choose(self, machine: Machine, others: Sequence[Served]) -> tuple[int, int]:
        count = max(1, blocks_that_fit(machine, self._model, self._cache_tokens))
        return petals.choose_blocks(self._model.num_blocks, count, others)

    def better(
        self, machine: Machine, own: Served, others: Sequence[Served], move_s: float
    ) -> tuple[int, int] | None:
        servers = [*others, own]
        if not petals.should_move(
            self._model.num_blocks,
            len(others),
            servers,
            balance_quality=self._quality,
            chance=self._chance,
        ):
            return None
        return petals.choose_blocks(self._model.num_blocks, own.blocks, others)


class PlannedRule:
    """Every server serves what a plan says; nobody moves."""

    def __init__(self, spans: Mapping[str, tuple[int, int]]) -> None:
        """Args: spans: blocks [start, stop) by the name of the machine."""
        self._spans = spans

    def choose(self, machine: Machine, others: Sequence[Served]) -> tuple[int, int]:
        return self._spans[machine.name]

    def better(
        self, machine: Machine, own: Served, others: Sequence[Served], move_s: float
    ) -> tuple[int, int] | None:
        return None
