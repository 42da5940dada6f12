"""Large messages of all clients share a number of bytes, in turn."""

from __future__ import annotations

import asyncio

import pytest

from swarmkit.net.rpc.receive_budget import ReceiveBudget


async def asking(receive_budget: ReceiveBudget, *sizes: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(receive_budget.take(size)) for size in sizes]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def let_in(tasks: list[asyncio.Task[None]]) -> list[bool]:
    return [task.done() for task in tasks]


async def test_what_fits_goes_in_at_once() -> None:
    assert let_in(await asking(ReceiveBudget(10), 4, 6)) == [True, True]


async def test_what_does_not_fit_waits() -> None:
    assert let_in(await asking(ReceiveBudget(10), 4, 7)) == [True, False]


async def test_it_goes_in_when_there_is_room_again() -> None:
    receive_budget = ReceiveBudget(10)
    _, second = await asking(receive_budget, 4, 7)
    receive_budget.give_back(4)
    await second
    assert receive_budget.held_bytes == 7


async def test_a_message_that_fits_waits_behind_one_that_does_not() -> None:
    assert let_in(await asking(ReceiveBudget(10), 4, 7, 1)) == [True, False, False]


async def test_what_is_larger_than_all_of_it_goes_in_alone() -> None:
    assert let_in(await asking(ReceiveBudget(10), 99, 1)) == [True, False]


async def test_whoever_gives_up_lets_those_behind_it_in() -> None:
    receive_budget = ReceiveBudget(10)
    _, second, third = await asking(receive_budget, 4, 7, 1)
    second.cancel()
    await third
    assert receive_budget.held_bytes == 5


async def test_whoever_gives_up_when_its_turn_has_come_gives_its_room_back() -> None:
    receive_budget = ReceiveBudget(10)
    _, second = await asking(receive_budget, 4, 7)
    receive_budget.give_back(4)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert receive_budget.held_bytes == 0
