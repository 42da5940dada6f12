"""Servers that mean to move: who may go, where they count meanwhile, and that no block loses its last one."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

import pytest

from swarmkit.placement.intentions import OVERDUE_S, TURNS, AnnouncedRun, Overdue, Span, expected, may_leave

HERE, THERE = (0, 4), (4, 8)


def run(peer_id: str, blocks: Span = HERE, *, is_online: bool = True, to: Span | None = None) -> AnnouncedRun:
    return AnnouncedRun(peer_id, *blocks, is_online, to)


# who may go


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([], "stay"),
        ([run("c")], "go"),
        ([run("c", (0, 2)), run("d", (2, 6))], "go"),
        ([run("c", (0, 2)), run("d", (3, 6))], "stay"),
        ([run("c", is_online=False)], "stay"),
        ([run("c", to=THERE)], "wait"),
        ([run("a", to=THERE)], "stay"),
        ([run("a", to=THERE), run("c", to=THERE)], "stay"),
        ([run("a", to=THERE), run("c")], "go"),
        ([run("c", (0, 2), to=THERE), run("d", (3, 4), to=THERE)], "stay"),
        ([run("c", (0, 2)), run("d", (2, 4), to=THERE)], "wait"),
        ([run("a", (8, 12), to=THERE), run("c", to=THERE)], "wait"),
        ([run("c"), run("c", THERE)], "stay"),
        ([run("c"), run("c", THERE, is_online=False)], "stay"),
    ],
)
def test_a_server_leaves_only_what_others_are_sure_to_keep(others: list[AnnouncedRun], verdict: str) -> None:
    assert may_leave("b", HERE, None, others) == verdict


@pytest.mark.parametrize(
    ("wanted", "others", "verdict"),
    [
        ((6, 10), [run("c", (2, 6))], "go"),  # four blocks get a server, two lose theirs
        ((6, 8), [run("c", (2, 6))], "stay"),  # as many get one as lose theirs
        ((6, 10), [run("c", (2, 6)), run("d", (6, 10), is_online=False)], "stay"),  # somebody else comes
        ((6, 10), [run("c", (2, 6)), run("d", (6, 10), to=HERE)], "stay"),  # every block has a server
        ((6, 8), [run("c", (2, 6)), run("d", (0, 2), to=THERE)], "wait"),  # if d goes, as many lose theirs
    ],
)
def test_while_blocks_have_no_server_one_leaves_its_own_if_more_have_a_server_then(
    wanted: Span, others: list[AnnouncedRun], verdict: str
) -> None:
    assert may_leave("b", HERE, None, others, wanted=wanted, num_blocks=10) == verdict


def test_blocks_that_it_serves_all_the_while_need_nobody_else() -> None:
    assert may_leave("b", (0, 4), (2, 6), [run("c", (0, 2))]) == "go"


# where those count that move


def places(*runs: AnnouncedRun, before: Sequence[str] | None = None) -> list[tuple[str, Span]]:
    return [(runs[number].peer_id, blocks) for number, blocks in expected("b", runs, before)]


def test_a_server_that_loads_other_blocks_is_not_counted_where_it_is() -> None:
    assert places(run("a"), run("a", THERE, is_online=False), run("c")) == [("a", THERE), ("c", HERE)]


def test_a_newcomer_counts_while_it_loads() -> None:
    assert places(run("a", is_online=False)) == [("a", HERE)]


def test_who_means_to_move_counts_where_it_means_to_go() -> None:
    assert places(run("a", to=THERE), run("c", to=THERE)) == [("a", THERE), ("c", THERE)]


def test_of_those_that_decide_at_the_same_moment_the_larger_ids_give_way() -> None:
    assert places(run("a", to=THERE), run("c", to=THERE), before=()) == [("a", THERE), ("c", HERE)]


def test_who_meant_to_move_before_counts_where_it_means_to_go() -> None:
    assert places(run("c", to=THERE), before={"c"}) == [("c", THERE)]


def test_a_server_that_has_begun_elsewhere_counts_once() -> None:
    assert places(run("a", to=THERE), run("a", THERE)) == [("a", THERE)]


@pytest.mark.parametrize("about_to", [[run("a", to=THERE)], [run("a"), run("a", THERE, is_online=False)]])
def test_who_takes_too_long_counts_where_it_is(about_to: list[AnnouncedRun]) -> None:
    assert [span for _, span in expected("b", about_to, overdue={"a"})] == [HERE]


def test_who_has_been_about_to_move_at_each_look_for_long_is_overdue() -> None:
    overdue, looks = Overdue(), []
    for now, to in ((0.0, THERE), (800.0, (6, 8)), (OVERDUE_S + 1, THERE), (1000.0, None), (1100.0, THERE)):
        looks.append(bool(overdue.at(now, [run("a", to=to), run("c")])))
    assert looks == [False, False, True, False, False]


# many at the same moment


class Crowd:
    """Servers that all mean to leave within a moment, and see each other's announcements late.

    What they decide is `may_leave`; when they look is as in `swarmkit/placement/move_protocol.py`.
    """

    def __init__(self, seed: int, *, notice_s: float, spread_s: float) -> None:
        chance = self._chance = random.Random(seed)
        self._notice_s, self._spread_s = notice_s, spread_s
        self._names = [f"{number:02}" for number in range(chance.randint(2, 30))]
        self._held = [(low := chance.randrange(6), chance.randint(low + 1, 8)) for _ in self._names]
        self._said: list[list[tuple[list[float], AnnouncedRun | None]]] = [[] for _ in self._names]
        self.left: set[int] = set()
        self.lost: set[int] = set()
        """Blocks that had a server, and then had none."""

    def _say(self, number: int, at: float, said: AnnouncedRun | None) -> None:
        known_at = [at + self._chance.uniform(0, self._spread_s) for _ in self._names]
        self._said[number].append((known_at, said))

    def _seen(self, by: int, at: float) -> list[AnnouncedRun]:
        found = []
        for number, said in enumerate(self._said):
            known = [one for known_at, one in said if known_at[by] <= at]
            if number != by and known and known[-1] is not None:
                found.append(known[-1])
        return found

    def live(self) -> Crowd:
        whole = self._covered()
        events: list[tuple[float, int, int]] = []
        for number, name in enumerate(self._names):
            self._say(number, -self._spread_s, run(name, self._held[number]))
            heapq.heappush(events, (self._chance.uniform(0, 2 * self._notice_s + 1.0), number, 0))
        while events:
            at, number, turn = heapq.heappop(events)
            name, held = self._names[number], self._held[number]
            if turn == 0:
                self._say(number, at, run(name, held, to=(8, 9)))
                heapq.heappush(events, (at + self._notice_s, number, 1))
                continue
            verdict = may_leave(name, held, None, self._seen(number, at))
            if verdict == "go":
                self.left.add(number)
                self._say(number, at, None)
                self.lost |= whole - self._covered()
            elif verdict == "wait" and turn < TURNS:
                heapq.heappush(events, (at + self._notice_s, number, turn + 1))
            else:
                self._say(number, at, run(name, held))
        return self

    def _covered(self) -> set[int]:
        staying = (held for number, held in enumerate(self._held) if number not in self.left)
        return {block for held in staying for block in range(*held)}

    @property
    def could_have_left(self) -> bool:
        """Whether another one of those that stayed could leave now, alone."""
        runs = [run(name, self._held[n]) for n, name in enumerate(self._names) if n not in self.left]
        return any(
            may_leave(one.peer_id, (one.start, one.stop), None, [other for other in runs if other != one])
            == "go"
            for one in runs
        )


SEEDS = range(60)


def test_no_block_loses_its_last_server_however_many_mean_to_leave_it() -> None:
    crowds = [Crowd(seed, notice_s=2.0, spread_s=2.0).live() for seed in SEEDS]
    assert [crowd.lost for crowd in crowds] == [set()] * len(crowds)
    assert all(crowd.left for crowd in crowds if crowd.could_have_left)


def test_who_does_not_wait_until_others_know_leaves_blocks_without_a_server() -> None:
    assert any(Crowd(seed, notice_s=0.5, spread_s=2.0).live().lost for seed in SEEDS)


def test_of_two_that_hold_the_same_blocks_one_waits_until_the_other_one_has_withdrawn() -> None:
    assert may_leave("a", HERE, None, [run("b", to=THERE)]) == "wait"
    assert may_leave("b", HERE, None, [run("a", to=THERE)]) == "stay"
    assert may_leave("a", HERE, None, [run("b")]) == "go"


# strangers


def test_a_stranger_that_means_to_leave_counts_for_as_much_as_one_that_is_not_there() -> None:
    """Whatever it says: those that others keep may be left, and those that it alone has besides may not."""
    for stranger in (run("0", to=THERE), run("z", to=THERE)):
        assert may_leave("b", HERE, None, [stranger, run("c")]) == "go"
        assert may_leave("b", HERE, None, [stranger]) != "go"
