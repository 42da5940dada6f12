"""Announcing servers and looking them up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from swarmkit.net.registry.acceptance import acceptable_now, is_acceptable
from swarmkit.net.registry.records import MODELS_KEY, block_key, sign
from swarmkit.net.registry.registry import Registry
from swarmkit.net.transport.memory import MemoryNetwork

from .announcements import FINGERPRINT, NOW, announcement, identity


class Place:
    """A network whose clock the test sets, and registries of peers in it."""

    def __init__(self) -> None:
        self.now = NOW
        self.network = MemoryNetwork(clock=lambda: self.now)
        self.transports: list[Any] = []

    def registry(self, number: int, **bounds: int) -> Registry:
        """Of server `number`; it keeps whatever it is told."""
        transport = self.network.transport(identity(number))
        self.transports.append(transport)
        return Registry(transport, lambda: self.now, **bounds)


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place()
    yield place
    for transport in place.transports:
        await transport.close()


async def found(registry: Registry) -> list[str]:
    return [server.peer_id for server in (await registry.look_up(FINGERPRINT, 6)).servers(NOW)]


async def test_what_one_announces_another_finds(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0))
    assert await found(client) == [identity(0).peer_id]


async def test_announcing_tells_how_many_keys_took_it(place: Place) -> None:
    assert await place.registry(0).announce(announcement(0)) == 3


async def test_a_server_of_any_block_is_found(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0, start=5, stop=6))
    assert len(await found(client)) == 1


async def test_servers_of_another_model_are_not_found(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0, fingerprint="f" * 32))
    assert await found(client) == []


async def test_servers_that_count_the_blocks_otherwise_are_not_found(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0, num_blocks=7))
    assert await found(client) == []


async def test_servers_of_every_model_can_be_listed(place: Place) -> None:
    one, two, client = place.registry(0), place.registry(1), place.registry(2)
    await one.announce(announcement(0))
    await two.announce(announcement(1, fingerprint="f" * 32))
    assert len((await client.look_up_all()).servers(NOW)) == 2


async def test_one_peer_may_serve_two_models(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0))
    await server.announce(announcement(0, fingerprint="f" * 32, service=1))
    found = (await client.look_up_all()).servers(NOW)
    assert {(one.fingerprint, one.service) for one in found} == {(FINGERPRINT, 0), ("f" * 32, 1)}


async def test_one_peer_may_serve_the_same_blocks_twice(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0))
    await server.announce(announcement(0, service=1))
    assert await found(client) == [identity(0).peer_id] * 2


async def test_the_latest_word_is_found(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0, sequence=1))
    await server.announce(announcement(0, sequence=2, state="leaving", expires_at=NOW + 61))
    view = await client.look_up(FINGERPRINT, 6)
    assert [server.state for server in view.announcements.values()] == ["leaving"]


async def test_a_server_that_moved_is_found_where_it_says_last(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0, start=0, stop=2, sequence=1))
    await server.announce(announcement(0, start=4, stop=6, sequence=2))
    view = await client.look_up(FINGERPRINT, 6)
    assert [(server.start, server.stop) for server in view.servers(NOW)] == [(4, 6)]


async def test_what_has_expired_is_not_found(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    await server.announce(announcement(0))
    place.now += 61
    assert await found(client) == []


# others' records


async def put(place: Place, number: int, key: str, value: bytes) -> None:
    """A peer stores what it likes."""
    place.registry(number)
    await place.transports[-1].store([(key, value)], NOW + 3000)


BAD = {
    "garbage": b"garbage",
    "nothing": b"",
    "another's": sign(announcement(5), identity(5)),
    "forged": sign(announcement(1), identity(5)),
    "of another model": sign(announcement(1, fingerprint="f" * 32), identity(1)),
    "of another block": sign(announcement(1, start=3, stop=4), identity(1)),
    "expired": sign(announcement(1, expires_at=NOW - 1), identity(1)),
    "too far ahead": sign(announcement(1, expires_at=NOW + 10**6), identity(1)),
    "too large": bytes(5000),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_record_is_ignored_and_counted(place: Place, kind: str) -> None:
    await put(place, 1, block_key(FINGERPRINT, 2), BAD[kind])
    client = place.registry(2)
    assert (await found(client), client.rejected) == ([], 1)


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_record_does_not_hide_a_good_one(place: Place, kind: str) -> None:
    await put(place, 1, block_key(FINGERPRINT, 2), BAD[kind])
    await place.registry(0).announce(announcement(0))
    assert await found(place.registry(2)) == [identity(0).peer_id]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_not_kept_for_others(kind: str) -> None:
    assert not is_acceptable(block_key(FINGERPRINT, 2), identity(1).peer_id, BAD[kind], NOW, NOW)


def test_a_record_of_another_time_is_not_kept_now() -> None:
    assert not acceptable_now(MODELS_KEY, identity(0).peer_id, sign(announcement(0), identity(0)), NOW)


async def test_what_is_remembered_is_bounded_whatever_is_stored(place: Place) -> None:
    client = place.registry(0, most_remembered=2)
    for number in range(1, 6):
        old = sign(announcement(number, expires_at=NOW - 1), identity(number))
        await put(place, number, block_key(FINGERPRINT, 2), old)
    await found(client)
    assert client.remembered <= 2


# waiting


async def test_waiting_ends_as_soon_as_there_is_enough(place: Place) -> None:
    await place.registry(0).announce(announcement(0))
    view = await place.registry(1).wait_for(FINGERPRINT, 6, lambda view: bool(view.servers(NOW)), timeout=60)
    assert len(view.servers(NOW)) == 1


async def test_waiting_sees_who_comes_later(place: Place) -> None:
    server, client = place.registry(0), place.registry(1)
    looks = 0

    def enough(view: Any) -> bool:
        nonlocal looks
        looks += 1
        return looks == 3

    await server.announce(announcement(0))
    await client.wait_for(FINGERPRINT, 6, enough, timeout=60, poll=0.001)
    assert looks == 3


async def test_waiting_in_vain_gives_what_there_is(place: Place) -> None:
    view = await place.registry(0).wait_for(FINGERPRINT, 6, lambda view: False, timeout=0.0)
    assert view.servers(NOW) == []


async def reader_of_a_flood(most_new: int) -> Registry:
    """Of a client that reads so many new records at a look; 25 servers have announced themselves."""
    network = MemoryNetwork(clock=lambda: NOW)
    for number in range(25):
        registry = Registry(network.transport(identity(number)), clock=lambda: NOW)
        await registry.announce(announcement(number))
    return Registry(network.transport(), clock=lambda: NOW, most_new=most_new)


async def test_in_a_flood_the_announcements_that_a_client_asks_for_are_read_first() -> None:
    reader = await reader_of_a_flood(most_new=1)
    first = {identity(number).peer_id for number in (3, 4)}
    assert first < set((await reader.look_up(FINGERPRINT, 6, first)).announcements)


async def test_of_a_flood_of_records_each_look_reads_a_part_until_all_are_read() -> None:
    reader = await reader_of_a_flood(most_new=10)
    found = [len((await reader.look_up(FINGERPRINT, 6)).announcements) for _ in range(3)]
    assert found == [10, 20, 25]
