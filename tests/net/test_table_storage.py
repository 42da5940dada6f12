"""The records that a peer keeps for others stay within bounds, whatever strangers store."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from typing import Any

import pytest

from swarmkit.net.hivemind.protocol import SLICE, in_slices
from swarmkit.net.hivemind.storage import (
    MAX_KEY_RECORDS,
    StoredRecord,
    bounded_storage,
    choose_dropped,
)
from swarmkit.net.hivemind.table import load_hivemind


def record(
    name: str, by: str = "a", *, nbytes: int = 10, expires_at: float = 1.0, wanted: bool = True
) -> StoredRecord:
    return StoredRecord("key", name, nbytes, by, expires_at, wanted)


def names(records: list[StoredRecord]) -> set[Any]:
    return {record.subkey for record in records}


# which records go


def test_records_within_both_bounds_stay() -> None:
    assert choose_dropped([record("1"), record("2")], max_records=2, max_bytes=20) == []


def test_records_that_this_peer_never_asked_for_go_first() -> None:
    records = [record("unknown", "b", wanted=False), record("known", "a")]
    assert names(choose_dropped(records, 1, 100)) == {"unknown"}


def test_a_peer_that_stores_much_does_not_displace_one_that_stores_little() -> None:
    flood = [record(f"flood {number}", "stranger", expires_at=9.0) for number in range(5)]
    assert "honest" not in names(choose_dropped([*flood, record("honest", "b")], 2, 100))


def test_of_one_peers_records_those_that_last_longest_stay() -> None:
    records = [record("short", expires_at=1.0), record("long", expires_at=2.0)]
    assert names(choose_dropped(records, 1, 100)) == {"short"}


def test_large_records_go_where_small_ones_still_fit() -> None:
    records = [record("small", "a", nbytes=10), record("large", "b", nbytes=95)]
    assert names(choose_dropped(records, 9, 100)) == {"large"}


def test_peers_that_store_alike_draw_lots_however_long_they_claim_to_last() -> None:
    records = [record("claims", "liar", expires_at=9.0), record("honest", "b", expires_at=1.0)]
    drawn = {"liar": 2, "b": 1}
    assert names(choose_dropped(records, 1, 100, lot=drawn.__getitem__)) == {"claims"}


def test_this_peers_own_records_stay() -> None:
    records = [record("own", "", wanted=False), record("foreign", "b")]
    assert names(choose_dropped(records, 1, 100)) == {"foreign"}


# the storage


@pytest.fixture(scope="module", autouse=True)
def hivemind() -> None:
    load_hivemind()


class Storing:
    """A bounded storage, and the peer that asks it to keep records."""

    def __init__(self, **bounds: int) -> None:
        self.peer = "stranger"
        self.storage = bounded_storage(lambda: self.peer, lambda value: value.startswith(b"known"), **bounds)
        self.expires_at = time.time() + 60

    def store(self, key: int, subkey: str, value: bytes = b"known", later: float = 0.0) -> bool:
        return bool(self.storage.store_subkey(key, subkey, value, self.expires_at + later))


def test_a_flood_of_records_keeps_within_the_bound() -> None:
    storing = Storing(max_records=100)
    for number in range(1000):
        storing.store(number, f"peer {number}")
    assert storing.storage.records <= 100


def test_a_flood_of_bytes_keeps_within_the_bound() -> None:
    storing = Storing(max_bytes=100_000)
    for number in range(100):
        storing.store(number, "peer", b"known" + bytes(4000))
    assert storing.storage.nbytes <= 100_000


def test_a_record_that_had_to_go_is_told_to_be_refused() -> None:
    storing = Storing(max_records=8)
    answers = [storing.store(number, "peer", later=-number) for number in range(9)]
    assert answers[-1] is False


def test_a_flood_of_unknown_models_leaves_the_known_ones_records() -> None:
    storing = Storing(max_records=50)
    storing.store(1, "honest")
    for number in range(500):
        storing.store(number + 2, f"peer {number}", b"unknown")
    assert "honest" in storing.storage.get(1).value


def test_a_flood_under_one_key_leaves_the_record_of_another_peer_there() -> None:
    storing = Storing()
    storing.peer = "honest"
    storing.store(1, "honest")
    storing.peer = "stranger"
    for number in range(MAX_KEY_RECORDS + 100):
        storing.store(1, f"name {number}", later=1.0)
    assert "honest" in storing.storage.get(1).value
    assert len(storing.storage.get(1).value) <= MAX_KEY_RECORDS


def test_many_peers_that_claim_to_last_long_do_not_displace_all_that_do_not() -> None:
    storing = Storing(max_records=100)
    for number in range(400):
        storing.peer = f"peer {number}"
        storing.store(number, storing.peer, later=60.0 if number % 2 else 0.0)
    kept = {subkey for _, found in storing.storage.items() for subkey, _ in found.value.items()}
    assert {int(name.split()[1]) % 2 for name in kept} == {0, 1}


def test_replacing_one_record_over_and_over_does_not_grow_the_heaps() -> None:
    storing = Storing(max_records=50)
    for number in range(1000):
        storing.store(1, "peer", later=number / 1000)
    assert len(storing.storage.expiration_heap) <= 101


def test_expired_records_are_counted_no_longer_when_room_is_needed() -> None:
    storing = Storing(max_records=2)
    storing.expires_at = time.time() + 0.05
    storing.store(1, "brief")
    storing.store(2, "brief")
    time.sleep(0.06)
    storing.expires_at = time.time() + 60
    assert storing.store(3, "lasting")


def test_a_value_without_a_signer_is_not_kept() -> None:
    storing = Storing()
    assert not storing.storage.store(1, b"known", storing.expires_at)


# over libp2p


@pytest.mark.timeout(60)
async def test_an_envelope_that_outlives_the_longest_lifetime_is_not_kept() -> None:
    from .worlds import HivemindWorld

    world = HivemindWorld()
    try:
        await world.peer()
        stranger = await world.peer()
        assert await stranger.store([("k", b"v")], time.time() + 10 * 365 * 86400) == 0
    finally:
        await world.close()


async def test_verifying_a_flood_leaves_the_loop_its_turns() -> None:
    verified = 0
    seen: list[int] = []

    def verify(*_: object) -> None:
        nonlocal verified
        verified += 1

    async def watch() -> None:
        for _ in range(10_000):
            seen.append(verified)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    await in_slices(verify, [(b"key", "peer", b"", 0.0, False)] * 1000)
    watching.cancel()
    assert max(later - earlier for earlier, later in pairwise(seen)) <= SLICE
