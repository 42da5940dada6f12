"""What every body of the transport must do as a keeper of the shared table."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from swarmkit.errors import UsageError

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]


async def test_a_stored_record_is_seen_by_another_peer(shared: Any, key: str) -> None:
    one, two = await shared.peer(), await shared.peer()
    assert await one.store([(key, b"blue")], time.time() + 60) == 1
    assert await two.fetch([key]) == {key: {one.peer_id: b"blue"}}


async def test_a_lone_peer_finds_its_own_records(world: Any) -> None:
    one = await world.peer()
    await one.store([("color", b"blue")], time.time() + 60)
    assert await one.fetch(["color"]) == {"color": {one.peer_id: b"blue"}}


async def test_keys_without_records_are_left_out(shared: Any, key: str) -> None:
    one = await shared.peer()
    await one.store([(key, b"1")], time.time() + 60)
    assert set(await one.fetch([key, "nobody's key"])) == {key}


async def test_fetching_nothing_finds_nothing(shared: Any) -> None:
    one = await shared.peer()
    assert await one.fetch([]) == {}


async def test_many_records_are_stored_at_once(shared: Any) -> None:
    one, two = await shared.peer(), await shared.peer()
    records = {f"key {number}": bytes([number]) for number in range(40)}
    assert await one.store(records.items(), time.time() + 60) == 40
    found = await two.fetch(records)
    assert found == {key: {one.peer_id: value} for key, value in records.items()}


async def test_peers_share_a_key(shared: Any, key: str) -> None:
    one, two, three = await shared.peer(), await shared.peer(), await shared.peer()
    await one.store([(key, b"1")], time.time() + 60)
    await two.store([(key, b"2")], time.time() + 60)
    assert await three.fetch([key]) == {key: {one.peer_id: b"1", two.peer_id: b"2"}}


async def test_the_services_of_one_peer_share_a_key(shared: Any, key: str) -> None:
    one, two = await shared.peer(), await shared.peer()
    await one.store([(key, b"first")], time.time() + 60)
    await one.store([(key, b"second")], time.time() + 60, 2)
    assert await two.fetch([key]) == {key: {one.peer_id: b"first", f"{one.peer_id}/2": b"second"}}


async def test_a_later_expiry_replaces_an_earlier_one(shared: Any, key: str) -> None:
    one, two = await shared.peer(), await shared.peer()
    now = time.time()
    await one.store([(key, b"old")], now + 60)
    await two.fetch([key])
    await one.store([(key, b"new")], now + 61)
    assert await two.fetch([key]) == {key: {one.peer_id: b"new"}}


async def test_an_earlier_expiry_does_not_replace_a_later_one(shared: Any, key: str) -> None:
    one, two = await shared.peer(), await shared.peer()
    now = time.time()
    await one.store([(key, b"new")], now + 61)
    assert await one.store([(key, b"old")], now + 60) == 0
    assert await two.fetch([key]) == {key: {one.peer_id: b"new"}}


async def test_an_expired_record_vanishes(shared: Any, key: str) -> None:
    one, two = await shared.peer(), await shared.peer()
    await one.store([(key, b"short")], time.time() + 0.5)
    await asyncio.sleep(0.6)
    assert await two.fetch([key]) == {}


async def test_a_record_that_expired_already_is_not_accepted(shared: Any, key: str) -> None:
    one = await shared.peer()
    assert await one.store([(key, b"v")], time.time() - 1) == 0


async def test_records_outlive_the_peer_that_others_joined_at(world: Any) -> None:
    first, one, two = await world.peer(), await world.peer(), await world.peer()
    await one.store([("k", b"v")], time.time() + 60)
    world.kill(first)
    assert await two.fetch(["k"]) == {"k": {one.peer_id: b"v"}}


async def test_a_record_that_nobody_accepts_is_not_stored(world: Any) -> None:
    def refuse(key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        return False

    one = await world.peer(record_check=refuse)
    assert await one.store([("k", b"v")], time.time() + 60) == 0


async def test_a_peer_does_not_believe_what_its_check_refuses(world: Any) -> None:
    def no_lies(key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        return value != b"lie"

    liar, honest = await world.peer(), await world.peer()
    careful = await world.peer(record_check=no_lies)
    await liar.store([("k", b"lie")], time.time() + 60)
    await honest.store([("k", b"truth")], time.time() + 60)
    assert await careful.fetch(["k"]) == {"k": {honest.peer_id: b"truth"}}


async def test_a_check_is_told_what_it_judges(world: Any) -> None:
    seen: set[tuple[str, str, bytes, float]] = set()

    def remember(key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        seen.add((key, subkey, value, expires_at))
        return True

    one = await world.peer(record_check=remember)
    expires_at = time.time() + 60
    await one.store([("the key", b"the value")], expires_at)
    assert seen == {("the key", one.peer_id, b"the value", expires_at)}


@pytest.mark.parametrize("expires_at", [float("inf"), float("nan")])
async def test_a_record_must_expire_some_time(shared: Any, key: str, expires_at: float) -> None:
    one = await shared.peer()
    with pytest.raises(UsageError):
        await one.store([(key, b"v")], expires_at)


async def test_the_table_is_for_small_values(shared: Any, key: str) -> None:
    one = await shared.peer()
    with pytest.raises(UsageError, match="small"):
        await one.store([(key, bytes(100_000))], time.time() + 60)
