"""When a peer that could not be had directly is tried again."""

from __future__ import annotations

from swarmkit.net.hivemind.direct_tries import NOT_REACHED_S, TURNED_AWAY_S, DirectTries

NOW = 1000.0


def test_a_peer_is_tried_that_is_not_known() -> None:
    assert DirectTries().may_try("peer", NOW)


def test_a_peer_that_turned_a_client_away_is_tried_again_soon() -> None:
    tries = DirectTries()
    tries.note("peer", "turned away", NOW)
    assert not tries.may_try("peer", NOW + TURNED_AWAY_S - 0.1)
    assert tries.may_try("peer", NOW + TURNED_AWAY_S)


def test_a_peer_that_turns_clients_away_again_and_again_is_tried_less_and_less_often() -> None:
    tries, now, pauses = DirectTries(), NOW, []
    for _ in range(12):
        tries.note("peer", "turned away", now)
        pauses.append(next(s for s in range(1, 1000) if tries.may_try("peer", now + s)))
        now += pauses[-1]
    assert pauses[:4] == [2, 4, 8, 16]
    assert pauses[-1] == NOT_REACHED_S


def test_a_peer_that_was_not_reached_is_left_alone_for_long() -> None:
    tries = DirectTries()
    tries.note("peer", "not reached", NOW)
    assert not tries.may_try("peer", NOW + NOT_REACHED_S - 1)
    assert tries.may_try("peer", NOW + NOT_REACHED_S)


def test_once_connected_a_peer_is_tried_at_once() -> None:
    tries = DirectTries()
    tries.note("peer", "turned away", NOW)
    tries.note("peer", "connected", NOW + 5)
    assert tries.may_try("peer", NOW + 5)
    tries.note("peer", "turned away", NOW + 6)
    assert tries.may_try("peer", NOW + 6 + TURNED_AWAY_S)


def test_peers_are_forgotten() -> None:
    tries = DirectTries()
    for number in range(100):
        tries.note(f"peer {number}", "turned away", NOW)
    tries.note("peer", "not reached", NOW + 10)
    assert len(tries) == 1
