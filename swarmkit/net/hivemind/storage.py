"""The records that this peer keeps for the shared table, bounded in number and in bytes.

Any peer may ask any other one to keep records, and a new name costs nothing. So the records of all peers
together are bounded, and when they exceed the bound some have to go: records that this peer never asked for
go before those that it announces or looks up, and among these the peers that store most lose theirs first.
The records under one key are bounded as well, because all of them travel in one answer, which may have 4
MiB.
"""

from __future__ import annotations

import hashlib
import importlib
import secrets
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_TABLE_BYTES = 16 * 1024**2
MAX_TABLE_RECORDS = 16_384
MAX_KEY_RECORDS = 1024
MAX_KEY_BYTES = 512 * 1024
"""Of all records under one key. A look-up asks one peer for several keys at a time, in one message."""
_RECORD_OVERHEAD_BYTES = 512
"""What a record takes besides its value: the dictionary entries and heap entries of hivemind's storage."""
_SHRINK_TO = 0.875
"""Of the bound, after records had to go: then the next one that comes does not have to choose again."""


@dataclass(frozen=True)
class StoredRecord:
    """What deciding about a record needs to know of it."""

    key: Hashable
    subkey: Hashable
    nbytes: int
    """Of the value."""
    stored_by: str
    """The peer that asked this one to keep it; empty = this peer itself."""
    expires_at: float
    wanted: bool
    """Whether this peer itself announces or looks up records of this kind."""


def choose_dropped(
    records: Iterable[StoredRecord],
    max_records: int,
    max_bytes: int,
    overhead_bytes: int = 0,
    lot: Callable[[str], int] = lambda stored_by: 0,
) -> list[StoredRecord]:
    """Choose which records go, so that those that stay keep within both bounds.

    Records that are wanted stay before those that are not. Among equals every storing peer may keep its
    first record before any may keep its second, and so on; of one peer's records the longest-lasting stay.
    Peers that store as many draw lots, since otherwise those would win that claim to last longest. This
    peer's own records always stay.

    Args:
        overhead_bytes: what each record counts besides its value.
        lot: the number that a storing peer has drawn; the smallest are kept.
    """
    ordered = sorted(records, key=lambda record: (not record.wanted, -record.expires_at))
    rank: Counter[str] = Counter()
    ranked: list[tuple[bool, bool, int, int, StoredRecord]] = []
    for record in ordered:
        by = record.stored_by
        ranked.append((bool(by), not record.wanted, rank[by], lot(by), record))
        rank[by] += 1
    ranked.sort(key=lambda entry: entry[:4])
    dropped: list[StoredRecord] = []
    kept_records = kept_bytes = 0
    for foreign, _, _, _, record in ranked:
        nbytes = record.nbytes + overhead_bytes
        fits = kept_records < max_records and kept_bytes + nbytes <= max_bytes
        if foreign and not fits:
            dropped.append(record)
        else:
            kept_records += 1
            kept_bytes += nbytes
    return dropped


def bounded_storage(
    stored_by: Callable[[], str],
    is_wanted: Callable[[bytes], bool],
    max_records: int = MAX_TABLE_RECORDS,
    max_bytes: int = MAX_TABLE_BYTES,
) -> Any:
    """Make a storage for hivemind's table that stays within bounds.

    Args:
        stored_by: the peer whose request is being served; empty = this peer.
        is_wanted: whether the record with this serialized value is of a kind that this peer uses.
    """
    module = importlib.import_module("hivemind.dht.storage")
    dictionary_type = module.DictionaryDHTValue

    class BoundedStorage(module.DHTLocalStorage):  # type: ignore[misc, name-defined]
        """hivemind's storage of records under key and subkey, with bounds."""

        def __init__(self) -> None:
            super().__init__()
            self._stored_by: dict[tuple[Any, Any], str] = {}
            self._key_bytes: Counter[Any] = Counter()
            """Of the values under each key, or more: those that have expired since are counted still."""
            self._writes = 0
            self._salt = secrets.token_bytes(8)
            self.records = 0
            self.nbytes = 0

        def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
            if subkey is None and not isinstance(value, dictionary_type):
                return False  # a value without a subkey says nothing about which peer signed it
            return bool(super().store(key, value, expiration_time, subkey))

        def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
            self._writes += 1
            before = self._size_of(key, subkey)
            stored = bool(super().store_subkey(key, subkey, value, expiration_time))
            if stored:
                self._stored_by[key, subkey] = stored_by()
                after = self._size_of(key, subkey)
                self.nbytes += after - before
                self.records += bool(after) - bool(before)
                self._key_bytes[key] += after - before - _RECORD_OVERHEAD_BYTES * (bool(after) - bool(before))
                stored = self._bound_key(key, subkey)
            # hivemind's heaps grow with every write, also with those that replace a record or are refused.
            if self.records > max_records or self.nbytes > max_bytes or self._writes > 2 * max_records:
                self._shrink()
                stored = stored and bool(self._size_of(key, subkey))
            return stored

        def _lot(self, stored_by: str) -> int:
            """What a peer has drawn here; at other peers it draws anew."""
            drawn = hashlib.blake2b(stored_by.encode(), key=self._salt, digest_size=8).digest()
            return int.from_bytes(drawn, "big")

        def _bound_key(self, key: Any, subkey: Any) -> bool:
            """Drop what exceeds the bounds of one key. Returns whether the record of `subkey` stays."""
            if len(self.data[key].value.data) <= MAX_KEY_RECORDS and self._key_bytes[key] <= MAX_KEY_BYTES:
                return True
            records = self._records_under(key)
            self._key_bytes[key] = sum(record.nbytes for record in records)
            if len(records) <= MAX_KEY_RECORDS and self._key_bytes[key] <= MAX_KEY_BYTES:
                return True
            limits = int(MAX_KEY_RECORDS * _SHRINK_TO), int(MAX_KEY_BYTES * _SHRINK_TO)
            dropped = choose_dropped(records, *limits, lot=self._lot)
            self._drop(dropped)
            return subkey not in {record.subkey for record in dropped}

        def _records_under(self, key: Any) -> list[StoredRecord]:
            entries = list(self.data[key].value.items())
            wanted = bool(entries) and is_wanted(
                entries[0][1].value
            )  # one key stands for one kind of records
            return [
                StoredRecord(
                    key, subkey, len(value), self._stored_by.get((key, subkey), ""), expires_at, wanted
                )
                for subkey, (value, expires_at) in entries
            ]

        def _drop(self, records: Iterable[StoredRecord]) -> None:
            for record in records:
                dictionary = self.data[record.key].value
                del dictionary[record.subkey]
                self._stored_by.pop((record.key, record.subkey), None)
                self.records -= 1
                self.nbytes -= record.nbytes + _RECORD_OVERHEAD_BYTES
                self._key_bytes[record.key] -= record.nbytes
                if not dictionary.data:
                    del self[record.key], self._key_bytes[record.key]

        def _size_of(self, key: Any, subkey: Any) -> int:
            """Bytes that a record is counted with; 0 if it is not kept."""
            found = self.data.get(key)
            entry = found.value.data.get(subkey) if found is not None else None
            return 0 if entry is None else len(entry.value) + _RECORD_OVERHEAD_BYTES

        def _shrink(self) -> None:
            """Count what is here now, without what has expired, and drop what exceeds the bounds."""
            records = self._counted()
            if self.records > max_records or self.nbytes > max_bytes:
                limits = int(max_records * _SHRINK_TO), int(max_bytes * _SHRINK_TO)
                self._drop(choose_dropped(records, *limits, _RECORD_OVERHEAD_BYTES, self._lot))
                self._counted()

        def _counted(self) -> list[StoredRecord]:
            records = [record for key, _ in list(self.items()) for record in self._records_under(key)]
            self.records = len(records)
            self.nbytes = sum(record.nbytes + _RECORD_OVERHEAD_BYTES for record in records)
            self._stored_by = {(record.key, record.subkey): record.stored_by for record in records}
            self._key_bytes = Counter()
            for record in records:
                self._key_bytes[record.key] += record.nbytes
            self._writes = 0
            for storage in (self, *(found.value for found in self.data.values())):
                storage.expiration_heap = sorted(storage.key_to_heap.values())
            return records

    return BoundedStorage()
