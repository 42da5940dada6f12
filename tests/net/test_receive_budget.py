"""Large messages of all clients share a number of bytes, in turn."""

from __future__ import annotations

import asyncio

import pytest

from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.net.transport.shares import Holder

RESERVATIONS: dict[asyncio.Task[None], ReceiveReservation] = {}
"""What each task asks for."""


async def asking(receive_budget: ReceiveBudget, *sizes: int) -> list[asyncio.Task[None]]:
    tasks = []
    for size in sizes:
        reservation = ReceiveReservation(receive_budget)
        tasks.append(asyncio.create_task(receive_budget.take(size, reservation)))
        RESERVATIONS[tasks[-1]] = reservation
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
    first, second = await asking(receive_budget, 4, 7)
    receive_budget.give_back(RESERVATIONS[first])
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
    first, second = await asking(receive_budget, 4, 7)
    receive_budget.give_back(RESERVATIONS[first])
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert receive_budget.held_bytes == 0


# shares

STRANGER, CLIENT = Holder("far", "stranger"), Holder("near", "client")


class Message:
    """A large message of a peer."""

    def __init__(self, budget: ReceiveBudget, holder: Holder, nbytes: int) -> None:
        self.refusals: list[Refusal] = []
        self.reservation = ReceiveReservation(budget, holder, self.refusals.append)
        self.task = asyncio.create_task(budget.take(nbytes, self.reservation))


async def messages(budget: ReceiveBudget, holder: Holder, *sizes: int) -> list[Message]:
    found = [Message(budget, holder, size) for size in sizes]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return found


async def test_one_peer_may_have_all_of_it() -> None:
    assert all(message.task.done() for message in await messages(ReceiveBudget(10), STRANGER, 5, 5))


async def test_a_peer_beyond_its_share_has_its_latest_message_given_up_for_another_peer() -> None:
    budget = ReceiveBudget(12)
    first, second, third = await messages(budget, STRANGER, 4, 4, 4)
    (own,) = await messages(budget, CLIENT, 4)
    assert [len(message.refusals) for message in (first, second, third)] == [0, 0, 1]
    assert (third.refusals[0].code, third.refusals[0].retry_after_s > 0) == ("busy", True)
    budget.give_back(third.reservation)
    await own.task


async def test_only_as_much_is_given_up_as_is_needed() -> None:
    budget = ReceiveBudget(12)
    held = await messages(budget, STRANGER, *[1] * 12)
    await messages(budget, CLIENT, 5)
    assert sum(len(message.refusals) for message in held) == 5


async def test_a_peer_within_its_share_gives_nothing_up() -> None:
    budget = ReceiveBudget(12)
    (held,) = await messages(budget, STRANGER, 6)
    await messages(budget, CLIENT, 6, 6)
    assert held.refusals == []


async def test_many_that_wait_for_one_peer_do_not_delay_another() -> None:
    budget = ReceiveBudget(4)
    first, *waiting = await messages(budget, STRANGER, *[4] * 20)
    (own,) = await messages(budget, CLIENT, 2)
    budget.give_back(first.reservation)
    await own.task
    assert not any(message.task.done() for message in waiting)


async def test_many_peers_of_one_host_have_the_share_of_one() -> None:
    budget = ReceiveBudget(12)
    sybils = [(await messages(budget, Holder("far", str(number)), 1))[0] for number in range(12)]
    await messages(budget, CLIENT, 6)
    assert sum(len(message.refusals) for message in sybils) == 6
