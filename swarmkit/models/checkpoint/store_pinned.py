"""A repository whose state is known from a manifest, so that the Hub is not asked for what the manifest has.

The manifest has the fingerprint that the user gave, so config, index and hashes are the right ones, whichever
peer sent them. Weights come from peers if the manifest has hashes of blocks, and otherwise from files of the
Hub with the manifest's hashes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.files import INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE, SINGLE_FILE
from swarmkit.models.checkpoint.manifest import Manifest, ManifestError
from swarmkit.models.checkpoint.shards import OnBytes, Part
from swarmkit.models.checkpoint.store import BlockStore, StoreEntry, key_of
from swarmkit.models.checkpoint.store_fetch import Claims
from swarmkit.models.checkpoint.store_hub import HubFiles

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


class PinnedFiles(HubFiles):
    """A repository as a manifest describes it."""

    def __init__(
        self,
        repo: str,
        manifest: Manifest,
        token: str | None,
        *,
        progress: bool = True,
        store: BlockStore | None = None,
    ) -> None:
        self.manifest = manifest
        super().__init__(repo, manifest.commit, token, progress=progress, store=store)
        self.block_hashes = manifest.blocks
        index = json.dumps({"metadata": {}, "weight_map": dict(manifest.weights)}).encode()
        self._whole = {
            "config.json": self._note("config.json", json.dumps(dict(manifest.config)).encode()),
            INDEX_FILE: self._note(INDEX_FILE, index),
        }
        self.store.note(key_of(repo, "pinned"), manifest.full_fingerprint.encode())

    def _find_commit(self) -> str:
        return self.manifest.commit

    @property
    def source(self) -> str:
        """The store's name for the repository, by its fingerprint; the commit is only a hint."""
        return f"{self.repo}@{self.manifest.full_fingerprint}"

    @cached_property
    def is_public(self) -> bool:
        """Whether it can be read without a token.

        Peers pass on only blocks for which that is so. If a block came from the Hub, perhaps with a token,
        the Hub is asked.
        """
        entries = [entry for entry in self.store.entries() if entry.source == self.source]
        return all(entry.origin == "peers" for entry in entries) or self._is_public_on_the_hub()

    def find(self, name: str) -> Path | None:
        if name in self._whole:
            return self._whole[name]
        return None if name in (PICKLE_FILE, PICKLE_INDEX_FILE) else super().find(name)

    def exists(self, name: str) -> bool:
        if name in (SINGLE_FILE, PICKLE_FILE):
            return name in self.manifest.files
        return super().exists(name)

    def sha256(self, name: str) -> str:
        return self.manifest.files[name]

    def known_hash(self, part: Part) -> str | None:
        return self._covered(part) or super().known_hash(part)

    def _entry(self, part: Part) -> StoreEntry | None:
        covered = self._covered(part)
        if covered is None:
            return super()._entry(part)
        entry = self.store.entry(self.source, part.label)
        return entry if entry is not None and entry.content == covered else None

    def _covered(self, part: Part) -> str | None:
        """The hash of a block that the fingerprint covers; None for what is in no block."""
        block = part.label.removeprefix("block ")
        return self.block_hashes[int(block)] if self.block_hashes and block.isdecimal() else None

    def has(self, part: Part) -> bool:
        self._adopt(part)
        return super().has(part)

    def fetch(
        self, parts: Sequence[Part], on_bytes: OnBytes | None = None, claims: Claims | None = None
    ) -> None:
        for part in parts:
            self._adopt(part)
        super().fetch(parts, on_bytes, claims)

    def _adopt(self, part: Part) -> None:
        """Use a part that an earlier start without this fingerprint has left in the store.

        Only if it has the hash that the fingerprint covers, or if the Hub itself said that the files at that
        commit have the manifest's hashes.
        """
        if self.store.entry(self.source, part.label) is not None:
            return
        covered = self._covered(part)
        if covered is not None:
            origins = {entry.origin for entry in self.store.entries() if entry.content == covered}
            if origins:
                self.store.link(self.source, part.label, covered, "hub" if "hub" in origins else "peers")
            return
        before = f"{self.repo}@{self.commit}"
        known = self.store.entry(before, part.label)
        if known is None or known.origin != "hub":
            return
        for shard in set(part.shards.values()):
            noted = self.store.noted(key_of(before, shard, "about"))
            if noted is None or json.loads(noted)[0] != self.manifest.files[shard]:
                return
        self.store.link(self.source, part.label, known.content, known.origin)

    def _note(self, name: str, content: bytes) -> Path:
        return self.store.note(f"{self.manifest.full_fingerprint}/{name}", content)

    def _cached(self, name: str) -> Path | None:
        path = super()._cached(name)
        known = self.manifest.files.get(name)
        # The Hub's cache names large files by their SHA-256.
        return path if path is None or known in (None, path.resolve().name) else None

    def _about(self, name: str) -> tuple[str, int] | None:
        about = super()._about(name)
        known = self.manifest.files.get(name)
        if about is not None and known not in (None, about[0]):
            raise ModelError(
                f"{name} of {self.repo} on the Hub is not the file that the fingerprint "
                f"{self.manifest.fingerprint} means. Wait for a peer that has the blocks, or leave the "
                "fingerprint out to take what the Hub has."
            )
        return about


def open_pinned(
    repo: str, fingerprint: str, token: str | None, *, progress: bool = True, store: BlockStore | None = None
) -> PinnedFiles | None:
    """Open the repository as the manifest in the store describes it; None if there is no such manifest."""
    manifest = find_manifest(store or BlockStore(), fingerprint)
    return PinnedFiles(repo, manifest, token, progress=progress, store=store) if manifest else None


def open_last_pinned(
    repo: str, token: str | None, *, progress: bool = True, store: BlockStore | None = None
) -> PinnedFiles | None:
    """Open the repository by the last fingerprint that was used for it; None without one, or when online."""
    from huggingface_hub import constants

    noted = (store or BlockStore()).noted(key_of(repo, "pinned"))
    if noted is None or not constants.is_offline_mode():
        return None
    return open_pinned(repo, noted.decode(), token, progress=progress, store=store)


def find_manifest(store: BlockStore, fingerprint: str) -> Manifest | None:
    """Return the manifest with this fingerprint; None if it is not in the store."""
    encoded = store.noted(f"{fingerprint}/{_MANIFEST}")
    if encoded is None:
        return None
    try:
        return Manifest.decode(encoded, fingerprint)
    except ManifestError as error:
        logger.warning("a manifest in %s is damaged and not used: %s", store.root, error)
        return None


def keep_manifest(store: BlockStore, manifest: Manifest) -> Path:
    """Keep a manifest in the store; returns its file."""
    return store.note(f"{manifest.full_fingerprint}/{_MANIFEST}", manifest.encoded)
