"""What a server has to know of a model before it has any weights: one small file that peers pass on.

A fingerprint is a hash of a manifest: config, the hashes of the files of weights, and the file that each
tensor lies in. So a manifest from any peer can be checked against a fingerprint from a trusted source, and a
server that was given a fingerprint need not ask the Hub for anything. What a fingerprint does not cover is
only a hint, and accepted only in a form that can do no harm: the dtype that the weights were published in,
and the commit at which the Hub has them.

The Hub publishes the hashes of whole files, of which one may hold thirty blocks. So a model that was never
downloaded has a fingerprint, by which peers meet, but nothing yet by which a block from a peer could be
checked. Once each block was on one machine, its manifest has their hashes too, and a second fingerprint, the
full one, covers these: whoever is given it can take blocks from any peer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.fingerprint import fingerprint, without_volatile

MAX_MANIFEST_BYTES = 32 * 1024 * 1024
"""Largest size that is accepted from a peer; enough for two hundred thousand tensors."""

_FIELDS = {"commit", "config", "files", "weights"}
_DTYPES = ("float32", "bfloat16", "float16")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*\.safetensors", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


class ManifestError(ModelError):
    """The bytes are not a manifest."""


@dataclass(frozen=True)
class Manifest:
    """A model without its weights.

    Attributes:
        config: the content of its config.json.
        files: every file of weights, to its SHA-256 in hex.
        weights: every tensor, to the file that it lies in.
        commit: the commit at which the Hub has these files; 40 hex characters.
        blocks: the SHA-256 in hex of each block's file in the store, in order; empty if they are not known.
    """

    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)
    weights: Mapping[str, str] = field(repr=False)
    commit: str
    blocks: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the model that this is the manifest of, by which peers meet."""
        return fingerprint(self.config, self.files, self.weights)

    @cached_property
    def full_fingerprint(self) -> str:
        """The fingerprint that covers the hashes of blocks as well; where there are none, the other one."""
        return fingerprint(self.config, self.files, self.weights, self.blocks)

    @property
    def without_blocks(self) -> Manifest:
        """The manifest without hashes of blocks."""
        return replace(self, blocks=()) if self.blocks else self

    @cached_property
    def encoded(self) -> bytes:
        """The manifest as it is stored and sent; equal manifests have equal bytes."""
        content = {
            "commit": self.commit,
            "config": portable_config(self.config),
            "files": dict(self.files),
            "weights": dict(self.weights),
        }
        if self.blocks:
            content["blocks"] = list(self.blocks)
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def content(self) -> str:
        """The SHA-256 of `encoded`, in hex."""
        return hashlib.sha256(self.encoded).hexdigest()

    @classmethod
    def decode(cls, encoded: bytes, expected: str) -> Manifest:
        """Read a manifest, which any peer may have sent. What the fingerprint does not cover is left out.

        Args:
            expected: the fingerprint that it must have, the full one or the other.

        Raises:
            ManifestError: it is too large, malformed, or that of another model.
        """
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"a manifest of {len(encoded)} bytes is too large")
        try:
            content = json.loads(encoded)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"a manifest is not JSON: {error}") from None
        if not isinstance(content, dict) or set(content) - {"blocks"} != _FIELDS:
            raise ManifestError(f"a manifest consists of {', '.join(sorted(_FIELDS))}, and perhaps blocks")
        commit, config, files, weights = (content[name] for name in sorted(_FIELDS))
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or not isinstance(config, dict):
            raise ManifestError("a manifest lacks a commit or a config")
        if not _maps(files, _FILE, _SHA256) or not _maps(weights, None, None) or not weights:
            raise ManifestError("a manifest lists no weights, or files by names that are not allowed")
        if set(weights.values()) != set(files):
            raise ManifestError("a manifest's tensors do not lie in its files")
        blocks = content.get("blocks", [])
        if not isinstance(blocks, list) or not all(
            isinstance(block, str) and _SHA256.fullmatch(block) for block in blocks
        ):
            raise ManifestError("a manifest lists hashes of blocks that are none")
        manifest = cls(portable_config(config), files, weights, commit, tuple(blocks))
        if manifest.full_fingerprint == expected:
            return manifest
        if manifest.fingerprint != expected:
            raise ManifestError(f"a manifest is that of {manifest.full_fingerprint}, not of {expected}")
        return manifest.without_blocks

    @property
    def can_be_shared(self) -> bool:
        """Whether `decode` would accept it: it is of safetensors files at a commit, and not too large."""
        return (
            bool(_COMMIT.fullmatch(self.commit))
            and _maps(self.files, _FILE, _SHA256)
            and len(self.encoded) <= MAX_MANIFEST_BYTES
        )


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that is accepted from a peer: what the fingerprint covers, and a dtype."""
    content: dict[str, Any] = without_volatile(config)
    dtype = config.get("dtype", config.get("torch_dtype"))
    return {**content, "dtype": dtype} if dtype in _DTYPES else content


def is_fingerprint(text: str) -> bool:
    """Whether `text` has the form of a fingerprint."""
    return _FINGERPRINT.fullmatch(text) is not None


def _maps(value: Any, key: re.Pattern[str] | None, item: re.Pattern[str] | None) -> bool:
    """Whether a JSON value is an object of strings, with keys and values of these forms."""
    return isinstance(value, Mapping) and all(
        isinstance(v, str) and (key is None or key.fullmatch(k)) and (item is None or item.fullmatch(v))
        for k, v in value.items()
    )
