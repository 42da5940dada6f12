"""Moves in a small swarm, where every server matters much: in turn, and such as help only together. Pure.

The rule of `choice.py` looks at one server's move at a time. It may end far from the best placement: where
one server has to make room before another one can do better, nobody has a reason to begin. Here a server
thinks on. If nobody's move helps, it asks for each of its own windows what all would do then, one after the
other, each by its own rule. If the swarm ends better, it makes the first move.

Nobody has to agree to anything. What the others would do follows from the announcements that all of them see:
the one whose move helps most goes first, and the rest wait for it. So a server that made room does not take
it back, unless nobody follows; then those that it waited for are expected to stay where they are. Each time
that it made room in vain, the next time has to promise twice as much, so that it does not try for ever.

How good a swarm is, is here what its weakest block carries, and among equals the potential of `choice.py`.
Each series of moves ends with a weakest block that is stronger by a set share, so that moves end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from swarmkit.placement.choice import PlacementMove, PlacementPolicy, least_gain, should_move
from swarmkit.placement.description import Demand, Machine, ModelSize, Served
from swarmkit.placement.latency import Floats

SMALL_SWARM = 64
"""Servers up to which one thinks on; in larger swarms every single one matters little."""
PATIENCE = 6
"""Looks for which a server waits for others that should move before it."""
_MOVES = 8
"""Moves that are thought of after one's own first one."""
_EQUAL = 1e-9

Integers = NDArray[np.intp]
Flags = NDArray[np.bool_]
Place = tuple[str, int, int]
"""A server's name and its blocks [start, stop)."""


class PlacementMover:
    """Decides for one server, look after look, and remembers for whom it made room or waited in vain."""

    def __init__(self) -> None:
        self._patience = PATIENCE
        self._staying: set[Place] = set()
        self._room = _MadeRoom()

    def better_place(
        self,
        machine: Machine,
        own: Served,
        others: Sequence[Served],
        model: ModelSize,
        demand: Demand | None = None,
        policy: PlacementPolicy | None = None,
        *,
        move_s: float = 60.0,
        count: int | None = None,
    ) -> PlacementMove | None:
        """A better place for a server that serves `own`, or None if it had better stay for now.

        As `should_move`. In a small swarm whose blocks all have servers, and whose demand is not known, a
        server moves in its turn, does not weaken the weakest block, and may make the first of several moves.
        """
        policy = policy or PlacementPolicy()
        alone = should_move(machine, own, others, model, demand, policy, move_s=move_s, count=count)
        if len(others) >= SMALL_SWARM or (demand is not None and demand.arrivals_per_s):
            return alone
        self._staying &= {_place(one) for one in others}
        may_move = [_place(one) not in self._staying for one in others]
        swarm = SmallSwarm(own, others, model.num_blocks, policy, move_s, may_move)
        if not swarm.weakest:
            return alone
        self._room.look(own, others, swarm.weakest, least_gain(policy, move_s))
        earlier = swarm.before_own()
        if earlier:
            self._wait_for(others[number] for number in earlier)
            return None
        self._patience = PATIENCE
        single = swarm.own_move()
        if single is None and alone is not None and swarm.weakest_after(alone) >= swarm.weakest:
            return alone
        return single or self._room.make(swarm, least_gain(policy, 2 * move_s))

    def _wait_for(self, others: Iterable[Served]) -> None:
        self._patience = max(0, self._patience - 1)
        if not self._patience:
            self._staying |= {_place(one) for one in others}


def _place(one: Served) -> Place:
    return one.name, one.start, one.stop


class _MadeRoom:
    """Remembers how often a server made room and nobody followed, among the same others."""

    def __init__(self) -> None:
        self._vain = 0
        self._others: set[str] = set()
        self._start: int | None = None
        """Where it last meant to go to make room."""
        self._has_gone = False
        """Whether it went there."""
        self._weakest = 0.0
        """What the weakest block carried before that."""

    def look(self, own: Served, others: Sequence[Served], weakest: float, least: float) -> None:
        """Note what has become of the swarm; `least` is how many times as much counts as more."""
        self._has_gone |= own.start == self._start
        is_stronger = self._has_gone and weakest >= least * self._weakest
        names = {one.name for one in others}
        if is_stronger or names != self._others:
            self._vain, self._start, self._has_gone = 0, None, False
        self._others = names

    def make(self, swarm: SmallSwarm, least: float) -> PlacementMove | None:
        """The first of several moves, where none is awaited of others."""
        if self._has_gone:
            self._vain, self._start, self._has_gone = self._vain + 1, None, False
        move = swarm.first_of_several(1 + (least - 1) * 2**self._vain)
        if move is not None:
            self._start, self._weakest = move.start, swarm.weakest
        return move


class SmallSwarm:
    """What the servers of a swarm would do, as one of them sees it.

    Attributes:
        weakest: tokens per second through the weakest block; 0 if some block has no server.
    """

    def __init__(
        self,
        own: Served,
        others: Sequence[Served],
        num_blocks: int,
        policy: PlacementPolicy,
        move_s: float,
        may_move: Sequence[bool],
    ) -> None:
        """Args: may_move: which of the others move if that helps; the rest stays where it is."""
        self._own, self._servers, self._num_blocks = own, [*others, own], num_blocks
        self._may_move = np.array([*may_move, True])
        self._least = least_gain(policy, move_s)
        self._starts = np.array([one.start for one in self._servers])
        present = self._after_own(self._starts[-1:])
        self.weakest = float(present.weakest[0])
        if self.weakest:
            moves = present.best_moves(np.array([0]))
            self._gains = moves.weakest[0] / self.weakest
            self._best = moves.start[0]

    def _after_own(self, starts: Integers) -> _Futures:
        """One row for each place where this server may go."""
        all_starts = np.repeat(self._starts[None], len(starts), axis=0)
        all_starts[:, -1] = starts
        return _Futures(self._servers, self._num_blocks, self._may_move, all_starts)

    def before_own(self) -> list[int]:
        """Numbers of the others whose moves help, and clearly more than this server's own."""
        gains, own = self._gains[:-1], float(self._gains[-1])
        least = self._least * own if own >= self._least else self._least
        return [int(number) for number in np.flatnonzero(self._may_move[:-1] & (gains >= least))]

    def own_move(self) -> PlacementMove | None:
        """This server's best move, if it helps by itself."""
        if self._gains[-1] < self._least:
            return None
        return self._move_to(int(self._best[-1]), float(self._gains[-1]), "then")

    def first_of_several(self, least: float) -> PlacementMove | None:
        """This server's move after which others would move so that the weakest block ends so many times as
        strong.
        """
        starts = np.arange(self._num_blocks - self._own.blocks + 1)
        futures = self._after_own(starts)
        futures.play(self._least)
        gains = futures.weakest / self.weakest  # at most 1 where it stays, since nobody's move helps now
        best = int(gains.argmax())
        if gains[best] < least:
            return None
        return self._move_to(int(starts[best]), float(gains[best]), "when others have followed")

    def _move_to(self, start: int, gain: float, when: str) -> PlacementMove:
        reason = f"the weakest block carries {gain:.2f} times as much {when}"
        return PlacementMove(start, start + self._own.blocks, gain, reason)

    def weakest_after(self, move: PlacementMove) -> float:
        """As `weakest`, when this server has moved."""
        moved = replace(self._own, start=move.start, stop=move.stop)
        starts = np.array([*self._starts[:-1], move.start])
        servers = [*self._servers[:-1], moved]
        return float(_Futures(servers, self._num_blocks, self._may_move, starts[None]).weakest[0])


@dataclass(frozen=True)
class _Moves:
    """Where each server would go by itself; arrays of [rows, servers].

    Attributes:
        start: of the best window.
        weakest: tokens per second through the weakest block then; 0 if the server has to stay, or would.
        potential: the sum over blocks of what they carry ** -2 then.
    """

    start: Integers
    weakest: Floats
    potential: Floats


class _Futures:
    """Placements that may come, one in each row, in which the servers move one after the other.

    Attributes:
        carried: [rows, blocks]: tokens per second through each block.
    """

    def __init__(self, servers: Sequence[Served], num_blocks: int, may_move: Flags, starts: Integers) -> None:
        """Args: starts: [rows, servers]: where each server's blocks begin."""
        self._rates = np.array([one.throughput for one in servers])
        self._counts = np.array([one.blocks for one in servers])
        self._blocks, self._may_move = np.arange(num_blocks), may_move
        self._starts = starts.copy()
        self._held = self._windows(starts, self._counts)  # [rows, servers, blocks]
        self._holders = self._held.sum(axis=1)  # [rows, blocks]
        self.carried: Floats = np.einsum("rsb,s->rb", self._held, self._rates)

    def _windows(self, starts: Integers, counts: Integers) -> Flags:
        """[..., blocks]: which blocks are in the window of so many blocks that begins there."""
        low, high = starts[..., None], (starts + counts)[..., None]
        return (low <= self._blocks) & (self._blocks < high)

    @property
    def weakest(self) -> Floats:
        """[rows]: tokens per second through the weakest block; 0 if some block has no server."""
        return np.where(self._holders.min(axis=1) > 0, self.carried.min(axis=1), 0.0)

    def best_moves(self, rows: Integers) -> _Moves:
        """Where each server would go by itself, in some rows."""
        shape = len(rows), len(self._rates)
        start, weakest, potential = np.zeros(shape, np.intp), np.zeros(shape), np.zeros(shape)
        for number, (rate, count) in enumerate(zip(self._rates, self._counts, strict=True)):
            held = self._held[rows, number]
            without = np.maximum(self.carried[rows] - rate * held, _EQUAL * rate)  # [rows, blocks]
            found, fall = _window_worths(without, rate, count)
            best = np.where(found >= found.max(axis=1, keepdims=True) * (1 - _EQUAL), fall, -np.inf).argmax(1)
            every = np.arange(len(rows))
            alone = (held & (self._holders[rows] < 2)).any(axis=1)
            stays = alone | (best == self._starts[rows, number])
            start[:, number] = best
            weakest[:, number] = np.where(stays, 0.0, found[every, best])
            potential[:, number] = (without**-2).sum(axis=1) - fall[every, best]
        return _Moves(start, weakest, potential)

    def play(self, least: float) -> None:
        """Let in each row that server move whose move helps most, until nobody's helps."""
        rows = np.flatnonzero(self.weakest)
        for _ in range(_MOVES):
            moves = self.best_moves(rows)
            helps = self._may_move & (moves.weakest >= least * self.weakest[rows, None])
            best = np.where(helps, moves.weakest, 0.0).max(axis=1, keepdims=True)
            first = helps & (moves.weakest >= best * (1 - _EQUAL))
            numbers = np.where(first, moves.potential, np.inf).argmin(axis=1)
            going = helps.any(axis=1)
            starts = moves.start[np.arange(len(rows)), numbers]
            rows, numbers, starts = rows[going], numbers[going], starts[going]
            if not len(rows):
                return
            held = self._windows(starts, self._counts[numbers])
            change = held.astype(np.intp) - self._held[rows, numbers]
            self.carried[rows] += change * self._rates[numbers, None]
            self._holders[rows] += change
            self._held[rows, numbers] = held
            self._starts[rows, numbers] = starts


def _window_worths(without: Floats, rate: float, count: int) -> tuple[Floats, Floats]:
    """What one more server brings that holds `count` blocks: [rows, starts].

    Returns:
        tokens per second through the weakest block then, and the fall of the potential.
    """
    rows, num_blocks = without.shape
    starts = num_blocks - count + 1
    before = np.full((rows, num_blocks + 1), np.inf)
    np.minimum.accumulate(without, axis=1, out=before[:, 1:])
    after = np.full((rows, num_blocks + 1), np.inf)
    np.minimum.accumulate(without[:, ::-1], axis=1, out=after[:, -2::-1])
    inside = np.lib.stride_tricks.sliding_window_view(without, count, axis=1).min(axis=2) + rate
    weakest = np.minimum(np.minimum(before[:, :starts], after[:, count:]), inside)
    falls = np.zeros((rows, num_blocks + 1))
    np.cumsum(without**-2 - (without + rate) ** -2, axis=1, out=falls[:, 1:])
    return weakest, falls[:, count:] - falls[:, :-count]
