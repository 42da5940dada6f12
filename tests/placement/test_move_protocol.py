"""The steps of a move: what is told, when the server looks again, and whether it goes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import anyio
import pytest

from swarmkit.placement.intentions import TURNS, AnnouncedRun, Span
from swarmkit.placement.move_protocol import is_turn, move_if_needed

HERE, THERE, ELSEWHERE = (0, 4), (4, 8), (2, 6)


class Server:
    """Finds these places in its looks, and writes down what it does."""

    def __init__(self, *finds: Span | None, error: Exception | None = None) -> None:
        self._finds = list(finds)
        self._error = error
        self.done: list[object] = []

    async def look(self, before: Collection[str] | None) -> tuple[Span | None, Collection[str]]:
        self.done.append(("look", before))
        return self._finds.pop(0), {"those who mean to move"}

    async def tell(self, blocks: Span | None) -> None:
        self.done.append(("tell", blocks))

    async def go(self, blocks: Span) -> None:
        if self._error is not None:
            raise self._error
        self.done.append(("go", blocks))

    async def pause(self) -> None:
        self.done.append("pause")


def steps(server: Server) -> list[object]:
    anyio.run(move_if_needed, server, server.pause)
    return server.done


BEFORE = {"those who mean to move"}
STAYS = ("tell", None)


def test_a_server_that_is_well_placed_tells_nobody_that_it_moves() -> None:
    assert steps(Server(None)) == [("look", None), STAYS]


def test_a_server_tells_waits_and_looks_again_before_it_goes() -> None:
    told = [("tell", THERE), "pause", ("look", BEFORE)]
    assert steps(Server(THERE, THERE)) == [("look", None), *told, ("go", THERE), STAYS]


def test_a_server_that_others_came_before_withdraws() -> None:
    told = [("tell", THERE), "pause", ("look", BEFORE)]
    assert steps(Server(THERE, None)) == [("look", None), *told, STAYS]


def test_another_place_is_told_like_the_first_one() -> None:
    told = [step for place in (THERE, ELSEWHERE) for step in (("tell", place), "pause", ("look", BEFORE))]
    assert steps(Server(THERE, ELSEWHERE, ELSEWHERE)) == [("look", None), *told, ("go", ELSEWHERE), STAYS]


def test_a_server_whose_best_place_always_changes_stays_after_some_turns() -> None:
    found = steps(Server(*[THERE, ELSEWHERE] * TURNS))
    assert [step for step in found if step[0] == "go"] == []
    assert (found.count("pause"), found[-1]) == (TURNS, STAYS)


def test_a_server_that_could_not_go_says_that_it_stays() -> None:
    server = Server(THERE, THERE, error=MemoryError("too little"))
    with pytest.raises(MemoryError):
        steps(server)
    assert server.done[-1] == STAYS


# whose turn it is

RIVAL, KEEPER = AnnouncedRun("c", *HERE, moving_to=THERE), AnnouncedRun("c", *HERE)


@pytest.mark.parametrize(
    ("looks", "answer", "pauses"),
    [
        ([[KEEPER]], True, 0),
        ([[]], False, 0),
        ([[RIVAL], [KEEPER]], True, 1),
        ([[RIVAL], []], False, 1),
        ([[RIVAL]] * TURNS, False, TURNS),
    ],
)
def test_a_server_waits_for_some_turns_until_another_one_keeps_its_blocks(
    looks: list[Sequence[AnnouncedRun]], answer: bool, pauses: int
) -> None:
    left, paused = list(looks), []

    async def others() -> Sequence[AnnouncedRun]:
        return left.pop(0)

    async def pause() -> None:
        paused.append(True)

    assert anyio.run(is_turn, "b", HERE, None, others, pause) is answer
    assert (len(paused), left) == (pauses, [])
