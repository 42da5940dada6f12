"""Who gives way when a peer needs what others hold."""

from __future__ import annotations

import pytest

from swarmkit.net.transport.shares import HeldPlaces, Holder, gives_way, host_of

A1, A2, A3 = (Holder("a", peer) for peer in "123")
B1, C1 = Holder("b", "1"), Holder("c", "1")
CAPACITY = 12


@pytest.mark.parametrize(
    ("held", "asking", "needed", "victim"),
    [
        # hosts share equally
        ({A1: 12}, B1, 1, A1),
        ({A1: 12}, B1, 6, A1),
        ({A1: 7, B1: 5}, B1, 1, A1),
        ({A1: 6, B1: 6}, B1, 1, None),
        ({A1: 6, B1: 6}, C1, 4, B1),
        ({A1: 4, B1: 4, C1: 4}, Holder("d", "1"), 3, C1),
        # nobody has more than its share at the cost of others
        ({A1: 12}, B1, 7, None),
        ({A1: 8, B1: 4}, A1, 1, None),
        ({A1: 8, B1: 4}, B1, 3, None),
        # many peers of one host are no more than one
        ({A1: 4, A2: 4, A3: 4}, B1, 6, A3),
        ({A1: 9, A2: 3}, B1, 1, A1),
        # peers of one host share what the host has
        ({A1: 12}, A2, 6, A1),
        ({A1: 12}, A2, 7, None),
        ({A1: 6, A2: 6}, A3, 4, A2),
        ({A1: 6, B1: 6}, A2, 3, A1),
        ({A1: 6, B1: 6}, A2, 4, None),
        ({A1: 9, B1: 3}, A2, 4, A1),
        # nothing to take
        ({}, A1, 13, None),
        ({A1: 12}, A1, 1, None),
    ],
)
def test_the_one_that_holds_most_beyond_its_share_gives_way_to_one_within_its_own(
    held: dict[Holder, float], asking: Holder, needed: float, victim: Holder | None
) -> None:
    assert gives_way(held, asking, needed, CAPACITY) == victim


def test_two_peers_that_ask_in_turn_do_not_take_from_each_other_for_ever() -> None:
    held: dict[Holder, float] = {A1: 12}
    takes = 0
    for turn in range(100):
        asking = (B1, A1)[turn % 2]
        if (victim := gives_way(held, asking, 1, CAPACITY)) is None:
            continue
        held[victim] -= 1
        held[asking] = held.get(asking, 0) + 1
        takes += 1
    assert held == {A1: 6, B1: 6}
    assert takes == 6


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2::7", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        ("a name", ""),
    ],
)
def test_a_machine_is_one_host_however_many_addresses_it_has(address: str, host: str) -> None:
    assert host_of(address) == host


# places


def test_places_know_what_came_first_and_last_of_each_peer() -> None:
    places: HeldPlaces[int] = HeldPlaces()
    for number, holder in enumerate([A1, B1, A1, A1, B1]):
        places.add(number, holder)
    places.remove(0)
    places.remove(3)
    assert [(places.first(one), places.last(one)) for one in (A1, B1, C1)] == [(2, 2), (1, 4), (None, None)]


def test_a_place_may_be_given_back_twice() -> None:
    places: HeldPlaces[int] = HeldPlaces()
    places.add(1, A1)
    for _ in range(2):
        places.remove(1)
    assert len(places) == 0


def test_who_gives_way_follows_from_the_places_that_are_held() -> None:
    places: HeldPlaces[int] = HeldPlaces()
    for number in range(CAPACITY):
        places.add(number, A1)
    assert places.gives_way(B1, CAPACITY) == A1
    for number in range(CAPACITY // 2):
        places.remove(number)
        places.add(CAPACITY + number, B1)
    assert places.gives_way(B1, CAPACITY) is None


def test_who_gives_way_is_found_as_soon_however_much_one_peer_holds() -> None:
    looked_at = 0

    class Thing:
        def __hash__(self) -> int:
            nonlocal looked_at
            looked_at += 1
            return id(self)

    places: HeldPlaces[Thing] = HeldPlaces()
    for _ in range(1000):
        places.add(Thing(), A1)
    looked_at = 0
    assert places.gives_way(B1, 1000) == A1
    assert places.last(A1) is not None
    assert looked_at == 0
