"""A checkpoint: a model's config, its files, and the file that each tensor lies in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from swarmkit.errors import ModelError, UsageError
from swarmkit.models.architecture.anatomy import (
    anatomy_of,
    skeleton_of,
    slice_config,
)
from swarmkit.models.architecture.quirks import family_of
from swarmkit.models.architecture.wrapper import text_names, text_part
from swarmkit.models.checkpoint.files import PACKAGED, Files, weights_listing
from swarmkit.models.checkpoint.manifest import Manifest, is_fingerprint
from swarmkit.models.checkpoint.open_files import open_files
from swarmkit.models.checkpoint.shards import OnBytes, Part
from swarmkit.models.checkpoint.store import key_of
from swarmkit.models.foreign_errors import reason_of


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's config, its files, and the file that each tensor lies in; reads no weights until asked.

    Attributes:
        name: the model as the user named it.
        config: the whole language model's config. Shared; do not change it.
        files: the folder or Hub repository.
        is_part: whether the language model is a part of another model (see `wrapper.py`).
    """

    name: str
    config: PreTrainedConfig
    files: Files = field(repr=False)
    is_part: bool = False

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | Checkpoint,
        *,
        revision: str | None = None,
        token: str | None = None,
        fingerprint: str | None = None,
        progress: bool = True,
    ) -> Checkpoint:
        """Find a model and read its config; weights are fetched and read only when they are needed.

        Args:
            model: "tiny-chat" (packaged), an existing folder, or a Hub name such as "Qwen/Qwen3-8B".
                A checkpoint is returned as it is.
            revision: branch, tag or commit on the Hub; the default is its main branch.
            token: for private and gated models; the default is HF_TOKEN or the one saved by logging in.
            fingerprint: the fingerprint that the model must have. If its manifest is in the store, the Hub is
                asked for nothing but weights.
            progress: show a bar while large files are hashed for the fingerprint, and while weights are
                fetched.

        Raises:
            UsageError: `fingerprint` does not look like one.
            ModelError: it cannot be found, reached or read, has no weights, is of an architecture that is
                not supported, or has another fingerprint.
        """
        if fingerprint is not None and not is_fingerprint(fingerprint):
            raise UsageError(
                f"{fingerprint!r} is not a fingerprint, which has 32 characters 0-9 and a-f; "
                "`swarmkit status --json` prints those of a swarm."
            )
        if isinstance(model, Checkpoint):
            model._must_be(fingerprint)
            return model
        name = os.fspath(model)
        files = open_files(name, revision=revision, token=token, fingerprint=fingerprint, progress=progress)
        config_file = files.find("config.json")
        assert config_file is not None, "open_files has found it"
        try:
            whole = AutoConfig.from_pretrained(str(config_file.parent), trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"The config.json of {name} cannot be used: {reason_of(error)}") from error
        config = text_part(whole)
        family_of(config.model_type)
        # The base model of an adapter is looked up by this: the packaged model is found by its folder only.
        config._name_or_path = str(config_file.parent) if name == PACKAGED else name
        checkpoint = cls(name, config, files, is_part=config is not whole)
        _ = checkpoint._listing  # which raises if there are no weights
        if len(files.block_hashes) not in (0, checkpoint.num_blocks):
            raise ModelError(
                f"The manifest of {fingerprint} has hashes of {len(files.block_hashes)} blocks, and {name} "
                f"has {checkpoint.num_blocks}. Ask for the right fingerprint where you got it."
            )
        checkpoint._must_be(fingerprint)
        return checkpoint

    @property
    def model_type(self) -> str:
        """The architecture by transformers' name: "llama", "qwen3", ..."""
        return str(self.config.model_type)

    @property
    def num_blocks(self) -> int:
        """Number of transformer layers of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that travel between blocks."""
        return int(self.config.hidden_size)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """The name of each tensor, to the name of the file it lies in.

        Raises:
            ModelError: the index or the only file cannot be fetched or read.
        """
        if not self._listing.endswith(".json"):
            return dict.fromkeys(self.files.keys(self._listing), self._listing)
        index = self.files.find(self._listing)
        assert index is not None, "weights_listing has found it"
        listed = _read_json(index, self.name).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise ModelError(f"{self._listing} of {self.name} lists no weights; download it again.")
        return listed

    @cached_property
    def manifest(self) -> Manifest:
        """What a server has to know of this model before it has weights; see `manifest.py`.

        On the Hub this needs the index and the hash of each file of weights, but not these files.

        Raises:
            ModelError: a file that the index names does not exist, or the Hub cannot be reached.
        """
        config_file = self.files.find("config.json")
        assert config_file is not None, "open_files has found it"
        hashes = {name: self.files.sha256(name) for name in sorted(set(self.weight_map.values()))}
        return Manifest(
            _read_json(config_file, self.name),
            hashes,
            self.weight_map,
            self.files.commit or "",
            self.files.block_hashes,
        )

    def full_manifest(self) -> Manifest | None:
        """The manifest with the hash of each block; None while a block was never on this machine.

        Raises:
            ModelError: see `manifest`.
        """
        if self.manifest.blocks:
            return self.manifest
        hashes = [self.files.known_hash(part) for part in self.block_parts(0, self.num_blocks)]
        known = tuple(each for each in hashes if each is not None)
        return replace(self.manifest, blocks=known) if len(known) == len(hashes) else None

    def make_full_manifest(self, on_block: OnBytes = lambda done, total: None) -> Manifest:
        """The manifest with the hash of each block; those that were never here are fetched, one by one.

        Args: on_block: called with (blocks done, blocks in all).

        Raises:
            ModelError: a block cannot be fetched, or none is handed on between peers: the weights lie in a
                folder or in PyTorch's own files.
        """
        if not self.manifest.can_be_shared:
            raise ModelError(
                f"{self.name} has no fingerprint that covers hashes of blocks: peers hand on blocks of "
                "safetensors files on the Hub only, not weights of a folder or of PyTorch's own files, which "
                "nobody can check against the Hub without all of them."
            )
        parts = self.block_parts(0, self.num_blocks)
        for done, part in enumerate(parts):
            on_block(done, len(parts))
            if self.files.known_hash(part) is None:
                self.files.fetch([part])
                self.files.release(part)
        on_block(len(parts), len(parts))
        manifest = self.full_manifest()
        assert manifest is not None, "each block has been here"
        return manifest

    @property
    def fingerprint(self) -> str:
        """A hash of weights and config, 32 hex characters, by which peers agree on the model.

        Raises:
            ModelError: see `manifest`.
        """
        return self.manifest.fingerprint

    def _must_be(self, fingerprint: str | None) -> None:
        if fingerprint is None:
            return  # without a look at the weights, of which a folder may lack some
        if fingerprint not in (self.manifest.fingerprint, self.manifest.full_fingerprint):
            raise ModelError(
                f"{self.name} has the fingerprint {self.fingerprint}, not {fingerprint}: it has changed, or "
                "the fingerprint is that of another model. Leave the fingerprint out to take what is there, "
                "or ask for the right one where you got it. If it covers hashes of blocks, a peer must "
                f"have its manifest; `swarmkit fingerprint {self.name}` makes it here."
            )

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read these tensors and no others, fetching what is not here by blocks (see `fetch`).

        Raises:
            ModelError: a key does not exist, or its file is missing or damaged.
        """
        wanted = list(keys)
        tensors = self.files.read(self._parts_with(wanted))
        return {key: tensors[key] for key in wanted}

    def fetch(self, start: int, stop: int, *, head: bool = False, on_bytes: OnBytes | None = None) -> None:
        """Fetch the weights of blocks `[start, stop)` in one go; does nothing for a folder.

        Only the bytes of these blocks are fetched from the Hub, and only those that the store lacks.

        Args:
            head: fetch also the tensors that are in no block.
            on_bytes: called with (bytes here, bytes in all), from this thread.

        Raises:
            UsageError: the range is empty or outside the model.
            ModelError: they cannot be fetched.
        """
        parts = self.block_parts(start, stop)
        if head:
            parts += self._parts_with(self.head_keys())
        self.files.fetch(parts, on_bytes)

    def has_blocks(self, start: int, stop: int) -> bool:
        """Whether reading blocks `[start, stop)` needs no network.

        Raises:
            UsageError, ModelError: as `block_keys`.
        """
        return all(self.files.has(part) for part in self.block_parts(start, stop))

    def block_parts(self, start: int, stop: int) -> list[Part]:
        """The parts in which the store keeps blocks `[start, stop)`, one for each.

        Raises:
            UsageError, ModelError: as `block_keys`.
        """
        return self._parts_with(self.block_keys(start, stop))

    def block_content(self, block: int) -> str | None:
        """The SHA-256 of a block's file in the store, which is the same on all machines; None if there is
        none.
        """
        return self.files.content(self.block_parts(block, block + 1)[0])

    def block_keys(self, start: int, stop: int) -> dict[str, str]:
        """The tensors of blocks `[start, stop)`.

        Returns:
            Their names in the checkpoint, to their names in a base model that has only these blocks
            (so that the first of them is block 0).

        Raises:
            UsageError: the range is empty or outside the model.
            ModelError: the checkpoint has no weights at all for one of the blocks.
        """
        if not 0 <= start < stop <= self.num_blocks:
            raise UsageError(
                f"There are no blocks [{start}, {stop}): {self.name} has {self.num_blocks} blocks."
            )
        anatomy = anatomy_of(self.config)
        keys: dict[str, str] = {}
        for block in range(start, stop):
            for key, inner in self._by_block.get(block, {}).items():
                keys[key] = f"{anatomy.layers}.{block - start}.{inner}"
            if block not in self._by_block:
                raise ModelError(
                    f"{self.name} has no weights for block {block}: it is incomplete, or they are not named "
                    f"{anatomy.prefix}.{anatomy.layers}.{block}.…, as transformers names them."
                )
        return keys

    def head_keys(self) -> dict[str, str]:
        """The tensors that are in no block: embeddings, final norm, output layer.

        Returns:
            Their names in the checkpoint, to their names in the causal language model.
        """
        anatomy = anatomy_of(self.config)
        prefix = anatomy.prefix + "."
        own = {key for keys in self._by_block.values() for key in keys}
        names = {key: name for key, name in self._names.items() if key not in own}
        # A checkpoint of the bare base model has no prefix anywhere, and nothing beside the base model.
        if not any(name.startswith(prefix) for name in self._names.values()):
            names = {key: prefix + name for key, name in names.items()}
        if self.is_part:
            # What is left may be other parts'.
            known = skeleton_of(anatomy.causal_class, slice_config(self.config, 0, 1)).state_dict()
            names = {key: name for key, name in names.items() if name in known}
        return names

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer.

        Raises:
            ModelError: the checkpoint has none, or it cannot be read.
        """
        where, options = self.files.pretrained()
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                where, trust_remote_code=False, **options
            )
        except Exception as error:
            raise ModelError(
                f"{self.name} has no tokenizer that can be loaded ({reason_of(error)}). Add the tokenizer's "
                "files to the checkpoint, or load one with transformers.AutoTokenizer."
            ) from error
        return tokenizer

    @cached_property
    def stored_block_bytes(self) -> int:
        """Bytes of the weights of one block (the largest, if they differ) as they are stored.

        Raises:
            ModelError: the headers of the files cannot be fetched.
        """
        return max(self.files.nbytes(part) for part in self.block_parts(0, self.num_blocks))

    @cached_property
    def _by_block(self) -> dict[int, dict[str, str]]:
        """For each block, the names of its tensors in the checkpoint, to their names inside the block."""
        anatomy = anatomy_of(self.config)
        blocks: dict[int, dict[str, str]] = {}
        for key, name in self._names.items():
            place = anatomy.block_of(name)
            if place is not None:
                blocks.setdefault(place[0], {})[key] = place[1]
        return blocks

    @cached_property
    def _names(self) -> dict[str, str]:
        """The names of the language model's tensors, to their names in a language model alone."""
        return text_names(self.weight_map) if self.is_part else {key: key for key in self.weight_map}

    @cached_property
    def _listing(self) -> str:
        return weights_listing(self.files, self.name)

    def _parts_with(self, keys: Iterable[str]) -> list[Part]:
        """The parts that hold these tensors: whole blocks, and of the head exactly what is asked for."""
        anatomy = anatomy_of(self.config)
        blocks: set[int] = set()
        head: list[str] = []
        for key in keys:
            if key not in self.weight_map:
                raise ModelError(f"{self.name} has no tensor {key!r}; the checkpoint is incomplete.")
            place = anatomy.block_of(self._names.get(key, key))
            if place is None:
                head.append(key)
            else:
                blocks.add(place[0])
        parts = [self._part(f"block {block}", list(self._by_block[block])) for block in sorted(blocks)]
        if head:
            whole = set(head) == set(self.head_keys())
            parts.append(self._part("head" if whole else f"head {key_of(*sorted(head))[:8]}", head))
        return parts

    def _part(self, label: str, keys: Sequence[str]) -> Part:
        return Part(label, {key: self.weight_map[key] for key in keys})


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} of {name} cannot be read ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} of {name} is not a JSON object; download it again.")
    return content
