"""A hash of a model's config and weights, by which peers know that they mean the same model.

Weights are hashed by file, with the list of the file that each tensor lies in. A file's SHA-256 is often
known without reading it (the Hub names its blobs by it); where it must be computed, it is remembered in the
user's cache folder until the file changes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from swarmkit.models.remembered import Remembered

_PROGRESS_FROM_BYTES = 256 * 1024 * 1024
_CHUNK_BYTES = 4 * 1024 * 1024
_SETTLED_AFTER_S = 2.0
"""A file changed more recently is not remembered: a second change could leave the same time stamp."""

_VOLATILE = frozenset(
    {"_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "dtype"}
    | {"torch_dtype", "transformers_version"}
)


def fingerprint(
    config: Mapping[str, Any],
    files: Mapping[str, str],
    weights: Mapping[str, str],
    blocks: Sequence[str] = (),
) -> str:
    """Return 32 hex characters that identify a model.

    Args:
        config: the content of its config.json. The file itself is used, not transformers' view of it, so
            that peers with different versions of transformers agree.
        files: every file of weights, to its SHA-256 in hex.
        weights: every tensor, to the file that it lies in.
        blocks: the SHA-256 in hex of each block's file in the store, where the fingerprint is to cover these.
    """
    parts = {"config": without_volatile(config), "files": dict(files), "weights": dict(weights)}
    if blocks:
        parts["blocks"] = list(blocks)
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def without_volatile(value: Any) -> Any:
    """Return a config without the entries that transformers adds to it, or that a user may choose."""
    if isinstance(value, Mapping):
        return {key: without_volatile(inner) for key, inner in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [without_volatile(inner) for inner in value]
    return value


def file_sha256(path: Path, *, progress: bool = True) -> str:
    """Return the SHA-256 of a file in hex; it is not computed again while the file is unchanged.

    Args:
        progress: show a bar while hashing a file of more than 256 MB.
    """
    real = path.resolve()
    before = real.stat()
    state = [before.st_size, before.st_mtime_ns, before.st_ino]
    known = recall(str(real))
    if isinstance(known, list) and known[:3] == state and len(known) == 4:
        return str(known[3])
    sha256 = hashlib.sha256()
    hidden = not progress or before.st_size <= _PROGRESS_FROM_BYTES
    with (
        real.open("rb") as file,
        tqdm(
            total=before.st_size, desc=f"Hashing {path.name}", unit="B", unit_scale=True, disable=hidden
        ) as bar,
    ):
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            bar.update(len(chunk))
    after = real.stat()
    unchanged = [after.st_size, after.st_mtime_ns, after.st_ino] == state
    if unchanged and time.time() - after.st_mtime > _SETTLED_AFTER_S:
        remember(str(real), [*state, sha256.hexdigest()])
    return sha256.hexdigest()


_HASHES = Remembered("file-hashes.json")


def recall(key: str) -> Any:
    """Return the value that was remembered under `key`; None if there is none."""
    return _HASHES.recall(key)


def remember(key: str, value: Any) -> None:
    """Remember `value` (made of JSON types) under `key`, if the cache folder can be written to."""
    _HASHES.remember(key, value)
