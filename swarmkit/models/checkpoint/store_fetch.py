"""Fetching parts of a model from the Hub into the store: only the wanted ranges of its shards.

The file of a part is made at its full size, and each tensor's bytes are written straight to their place in
it::

    shard 2 on the Hub    | header | … | block 3: q k v | … | block 4: up down | …
                                            └──────┐            └───────┐
    partial files         block 3: | header | … q k v |   block 4: | header | up down … |

A journal beside each file says which bytes of which shard are there, so that a cut or a crash costs at most
`JOURNAL_BYTES`.

These are checked: that every range is the one requested, of a file of the same size and ETag; the Hub's
SHA-256 of a shard, if its whole content was wanted or sent; and the SHA-256 of the part, if the fingerprint
covers it or an earlier fetch from the Hub has left it in the store's index. What does not fit is fetched
again, at most `ATTEMPTS` times in all. The Hub publishes no hash for a part. Hashes that peers claim are no
proof, but reason for doubt: a part with none of the claimed hashes is fetched once more, and accepted if it
is the same twice. Without claims, it is accepted as it arrives over TLS.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.byte_ranges import ByteRange, coalesce, length, merge, subtract
from swarmkit.models.checkpoint.ranges import SHA256, RemoteFile
from swarmkit.models.checkpoint.shards import OnBytes, Part
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_format import Header, TensorPlace, lay_out, sha256_of

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often bytes that turn out to be wrong are fetched."""

JOURNAL_BYTES = 32 * 1024 * 1024
"""Most bytes that have to be fetched again after a crash."""

SPARE = 1 / 256
"""Share of unwanted bytes that may be fetched beside wanted ones to save requests."""

_CHUNK_BYTES = 4 * 1024 * 1024

Claims = Mapping[str, Collection[str]]
"""Labels of parts, to SHA-256 hashes that peers say their files have."""


class Shards(Protocol):
    """The safetensors files that parts are cut from, and where their parts are kept."""

    def stored(self, part: Part) -> Path | None:
        """Return a part's file in the store, verified and to be believed; None if it is not there."""

    def header(self, name: str, *, fresh: bool = False) -> Header:
        """Return the header of a shard; `fresh`: fetch it again, because something is wrong with the known
        one.
        """

    def remote(self, name: str) -> RemoteFile:
        """Return a shard whose bytes can be read."""


class _Building:
    """A part that is being fetched: its partial file and its journal."""

    def __init__(self, part: Part, shards: Shards, path: Path) -> None:
        self.part = part
        self.path = path
        self.origin: dict[str, TensorPlace] = {}
        for name, shard in part.shards.items():
            places = shards.header(shard).places
            if name not in places:
                places = shards.header(shard, fresh=True).places
            if name not in places:
                raise ModelError(
                    f"{shard} has no tensor {name!r}, which its index names; tell the model's owner."
                )
            self.origin[name] = places[name]
        self.layout = lay_out(self.origin.values())
        self.done: dict[str, list[ByteRange]] = {}
        self._file: BinaryIO
        self.etags = {shard: shards.remote(shard).etag for shard in sorted(set(part.shards.values()))}
        self._since_journal = 0

    def wanted(self, shard: str) -> list[ByteRange]:
        """The bytes of a shard that belong to this part."""
        places = (self.origin[name] for name, where in self.part.shards.items() if where == shard)
        return merge(ByteRange(place.start, place.stop) for place in places)

    def missing(self, shard: str) -> list[ByteRange]:
        return subtract(self.wanted(shard), self.done.get(shard, []))

    @contextmanager
    def opened(self) -> Iterator[_Building]:
        """While this lasts, bytes can be written; at its end the journal says which are there."""
        with self.path.open("r+b") as self._file:
            self._read_journal()
            try:
                yield self
            finally:
                if not self._file.closed:
                    self.save()

    def close(self) -> None:
        """Close the complete file, which will be moved."""
        self._file.close()

    def write(self, shard: str, place: TensorPlace, offset: int, data: memoryview) -> None:
        """Write bytes of the shard from `offset` on, all of them inside one tensor of this part."""
        target = self.layout.places[place.name].start + offset - place.start
        self._file.seek(target)
        self._file.write(data)
        self.done[shard] = merge([*self.done.get(shard, []), ByteRange(offset, offset + len(data))])
        self._since_journal += len(data)
        if self._since_journal >= JOURNAL_BYTES:
            self.save()

    def save(self) -> None:
        """Write the journal, after the bytes that it lists."""
        self._file.flush()
        os.fsync(self._file.fileno())
        journal = {"layout": self._layout_hash(), "etags": self.etags, "done": self.done}
        scratch = self.path.with_suffix(".json.new")
        scratch.write_text(json.dumps(journal))
        scratch.replace(self.path.with_suffix(".json"))
        self._since_journal = 0

    def forget(self, shard: str | None = None) -> None:
        """Have everything, or everything from one shard, fetched again."""
        self.done = {} if shard is None else {name: had for name, had in self.done.items() if name != shard}

    def sha256(self) -> str:
        """Finish the file, and return its SHA-256."""
        self._file.seek(0)
        self._file.write(self.layout.front)
        self.save()
        self._file.seek(0)
        return sha256_of(self._file)

    def hash_into(self, digest: Any, place: TensorPlace) -> None:
        """Add the bytes of a tensor, as they were written, to `digest`."""
        target = self.layout.places[place.name]
        self._file.seek(target.start)
        for start in range(target.start, target.stop, _CHUNK_BYTES):
            digest.update(self._file.read(min(_CHUNK_BYTES, target.stop - start)))

    def _layout_hash(self) -> str:
        return hashlib.sha256(self.layout.front).hexdigest()

    def _read_journal(self) -> None:
        try:
            journal = json.loads(self.path.with_suffix(".json").read_text())
            done = {shard: [ByteRange(*span) for span in spans] for shard, spans in journal["done"].items()}
            if journal["layout"] == self._layout_hash() and journal["etags"] == self.etags:
                self.done = done
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # there is no journal that can be used: all of it is fetched


def fetch_parts(
    store: BlockStore,
    source: str,
    shards: Shards,
    parts: Iterable[Part],
    on_bytes: OnBytes | None = None,
    claims: Claims | None = None,
    expected: Mapping[str, str] | None = None,
) -> None:
    """Fetch those of these parts that the store lacks.

    Args:
        expected: the hashes that parts must have, by label, where these are known.
        claims: the hashes that peers say parts have.

    Raises:
        ModelError: bytes did not come, were wrong again and again, or there is no room for them.
        HfHubHTTPError: the Hub refused.
    """
    ordered = sorted({part.label: part for part in parts}.values(), key=lambda part: part.label)
    with store.writing(", ".join(part.label for part in ordered)), ExitStack() as held:
        for part in ordered:  # all take them in the same order, so that none wait in a circle
            held.enter_context(store.fetching(source, part.label))
        lacking = [part for part in ordered if shards.stored(part) is None]
        buildings: list[_Building] = []
        for part in lacking:
            building = _Building(part, shards, store.partial(source, part.label))
            store.reserve(building.path, building.layout.size)
            buildings.append(held.enter_context(building.opened()))
        if buildings:
            _Fetch(store, source, shards, buildings, on_bytes, claims or {}, expected or {}).run()


class _Fetch:
    """Fetches some parts together, shard by shard."""

    def __init__(
        self,
        store: BlockStore,
        source: str,
        shards: Shards,
        buildings: Sequence[_Building],
        on_bytes: OnBytes | None,
        claims: Claims,
        expected: Mapping[str, str],
    ) -> None:
        self._claims = claims
        self._expected = expected
        self._store = store
        self._source = source
        self._shards = shards
        self._buildings = buildings
        self._on_bytes = on_bytes or (lambda done, total: None)
        self._total = sum(length(b.wanted(s)) for b in buildings for s in b.etags)
        self._have = self._total - sum(length(b.missing(s)) for b in buildings for s in b.etags)

    def run(self) -> None:
        for shard in sorted({shard for building in self._buildings for shard in building.etags}):
            self._fetch_shard(shard)
        for building in self._buildings:
            self._finish(building)

    def _fetch_shard(self, shard: str) -> None:
        concerned = [building for building in self._buildings if shard in building.etags]
        remote = self._shards.remote(shard)
        for _ in range(ATTEMPTS):
            verified = self._stream(shard, concerned)
            if verified or self._has_right_hash(shard, concerned, remote):
                return
            logger.warning("what came of %s does not have its hash; it is fetched again", remote.label)
            for building in concerned:
                self._have -= length(building.wanted(shard))
                building.forget(shard)
        raise ModelError(
            f"{remote.label} was fetched {ATTEMPTS} times and never had the hash that the Hub publishes. "
            "Something on the way changes it: try another network or mirror (HF_ENDPOINT)."
        )

    def _stream(self, shard: str, concerned: Sequence[_Building]) -> bool:
        """Fetch what is missing of one shard; returns whether its hash was checked on the way."""
        targets = sorted(
            ((building.origin[name], building) for building in concerned for name in building.part.shards
             if building.part.shards[name] == shard and building.origin[name].nbytes),
            key=lambda target: target[0].start,
        )  # fmt: skip
        starts = [place.start for place, _ in targets]
        missing = merge(span for building in concerned for span in building.missing(shard))
        self._on_bytes(self._have, self._total)

        def keep(offset: int, data: memoryview) -> None:
            at = max(bisect_right(starts, offset) - 1, 0)
            while at < len(targets) and targets[at][0].start < offset + len(data):
                place, building = targets[at]
                low, high = max(place.start, offset), min(place.stop, offset + len(data))
                if low < high:
                    fresh = length(subtract([ByteRange(low, high)], building.done.get(shard, [])))
                    building.write(shard, place, low, data[low - offset : high - offset])
                    self._have += fresh
                at += 1
            self._on_bytes(self._have, self._total)

        spare = int(length(missing) * SPARE)
        return bool(missing) and self._shards.remote(shard).stream(coalesce(missing, spare), keep)

    def _has_right_hash(self, shard: str, concerned: Sequence[_Building], remote: RemoteFile) -> bool:
        """Whether all of the shard is here, in whatever parts, and has the Hub's hash; True if that is
        unknown.
        """
        header = self._shards.header(shard)
        where = {name: b for b in concerned for name, of in b.part.shards.items() if of == shard}
        places = sorted(header.places.values(), key=lambda place: (place.start, place.stop))
        ends = [len(header.front), *(place.stop for place in places)]
        whole = all(place.start == end for place, end in zip(places, ends, strict=False))
        if not whole or ends[-1] != header.size or not SHA256.fullmatch(remote.etag):
            return True
        if any(place.name not in where for place in places):
            return True
        digest = hashlib.sha256(header.front)
        for place in places:
            where[place.name].hash_into(digest, place)
        return digest.hexdigest() == remote.etag

    def _finish(self, building: _Building) -> None:
        source, label = self._source, building.part.label
        expected = self._expected.get(label)
        good = {expected} if expected is not None else set(self._claims.get(label, ()))
        content = building.sha256()
        for _ in range(ATTEMPTS - 1):
            if not good or content in good:
                break
            if expected is None:
                good.add(content)  # as good as a claim, if it comes again
            logger.warning("%s of %s is not what it should be; it is fetched again", label, source)
            self._have -= sum(length(building.wanted(shard)) for shard in building.etags)
            building.forget()
            for shard in building.etags:
                self._stream(shard, [building])
            content = building.sha256()
        if good and content not in good:
            building.forget()
            raise ModelError(
                f"{label} of {source} came {ATTEMPTS} times with other bytes"
                + (
                    " than the fingerprint or an earlier download says"
                    if expected is not None
                    else " each time"
                )
                + ". Something on the way changes them: try another network or mirror (HF_ENDPOINT). If the "
                f"first time was the wrong one, delete {self._store.root / 'index'} and start again."
            )
        building.close()
        self._store.keep(building.path, source, label, content, "hub")
