"""Manifests: from anybody, for whoever knows the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swarmkit.errors import ModelError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, ManifestError, portable_config
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_pinned import PinnedFiles, find_manifest, keep_manifest
from swarmkit.models.execution.stage import Stage

from .hub import COMMIT, LocalHub, local_hub, unplug, use_hub
from .tiny import make_checkpoint

FILE = "model.safetensors"
A_MANIFEST = Manifest({"model_type": "llama", "hidden_size": 8}, {FILE: "ab" * 32}, {"a": FILE}, COMMIT)


def changed(**changes: Any) -> bytes:
    """The encoding of a manifest with other content, of whatever form."""
    return json.dumps({**json.loads(A_MANIFEST.encoded), **changes}).encode()


@pytest.fixture(scope="module")
def folder(checkpoints: Path) -> Path:
    return make_checkpoint(checkpoints, "llama", num_blocks=4, shards=2, seed=5, hidden_size=64)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub({"some/llama": folder}) as hub:
        use_hub(hub, tmp_path / "home", monkeypatch)
        yield hub


@pytest.fixture
def manifest(hub: LocalHub) -> Manifest:
    """That of some/llama, from the Hub; the store of this test has it, and nothing else."""
    manifest = Checkpoint.open("some/llama", progress=False).manifest
    keep_manifest(BlockStore(), manifest)
    hub.requests.clear()
    return manifest


def another(folder: Path) -> Path:
    """A model with the same names and shapes, and other weights."""
    return make_checkpoint(folder, "llama", num_blocks=4, shards=2, seed=6, hidden_size=64)


def pinned(manifest: Manifest) -> Checkpoint:
    return Checkpoint.open("some/llama", fingerprint=manifest.fingerprint, progress=False)


# what is believed


def test_what_is_encoded_is_decoded() -> None:
    assert Manifest.decode(A_MANIFEST.encoded, A_MANIFEST.fingerprint) == A_MANIFEST


def test_who_has_the_same_manifest_has_the_same_bytes() -> None:
    other = Manifest.decode(changed(), A_MANIFEST.fingerprint)
    assert other.content == A_MANIFEST.content


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"model_type": "llama", "hidden_size": 16}},
        {"files": {FILE: "cd" * 32}},
        {"weights": {"b": FILE}},
        {"weights": {"a": FILE, "b": FILE}},
    ],
)
def test_a_manifest_of_something_else_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match=f"not of {A_MANIFEST.fingerprint}"):
        Manifest.decode(changed(**changes), A_MANIFEST.fingerprint)


def test_hashes_of_blocks_are_read_where_the_fingerprint_covers_them() -> None:
    full = replace(A_MANIFEST, blocks=("12" * 32, "34" * 32))
    assert full.fingerprint == A_MANIFEST.fingerprint != full.full_fingerprint
    assert Manifest.decode(full.encoded, full.full_fingerprint) == full


def test_hashes_of_blocks_that_the_fingerprint_does_not_cover_are_left_out() -> None:
    full = replace(A_MANIFEST, blocks=("12" * 32,))
    assert Manifest.decode(full.encoded, full.fingerprint) == A_MANIFEST


def test_other_hashes_of_blocks_are_refused() -> None:
    full = replace(A_MANIFEST, blocks=("12" * 32, "34" * 32))
    with pytest.raises(ManifestError, match=f"not of {full.full_fingerprint}"):
        Manifest.decode(changed(blocks=["12" * 32, "35" * 32]), full.full_fingerprint)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b" " * (MAX_MANIFEST_BYTES + 1),
        changed(more=1),
        changed(blocks={}),
        changed(blocks=["short"]),
        changed(blocks=[7]),
        changed(commit="main"),
        changed(commit="../" * 13 + "x"),
        changed(config=[]),
        changed(files={"../../model.safetensors": "ab" * 32}, weights={"a": "../../model.safetensors"}),
        changed(files={"/etc/model.safetensors": "ab" * 32}, weights={"a": "/etc/model.safetensors"}),
        changed(files={"model.bin": "ab" * 32}, weights={"a": "model.bin"}),
        changed(files={FILE: "short"}),
        changed(files={FILE: 7}),
        changed(files={}, weights={}),
        changed(weights={"a": 7}),
        changed(weights={"a": "other.safetensors"}),
    ],
)
def test_what_is_no_manifest_is_refused(encoded: bytes) -> None:
    with pytest.raises(ManifestError, match="a manifest"):
        Manifest.decode(encoded, A_MANIFEST.fingerprint)


def test_what_the_fingerprint_does_not_cover_is_not_taken_from_a_stranger() -> None:
    config = {**A_MANIFEST.config, "_attn_implementation": "somebody/kernel", "transformers_version": "0"}
    read = Manifest.decode(changed(config=config), A_MANIFEST.fingerprint)
    assert read.config == A_MANIFEST.config


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", True), ("int8", False), ({"evil": 1}, False)])
def test_a_dtype_is_kept_if_it_is_one(dtype: object, kept: bool) -> None:
    assert ("dtype" in portable_config({"torch_dtype": str(dtype)})) is kept


def test_weights_in_pythons_own_format_are_not_shared_by_manifest() -> None:
    assert not Manifest(
        {}, {"pytorch_model.bin": "ab" * 32}, {"a": "pytorch_model.bin"}, COMMIT
    ).can_be_shared


# what it is good for


def test_with_a_manifest_in_the_store_the_hub_is_not_asked_what_a_model_is(
    hub: LocalHub, manifest: Manifest
) -> None:
    checkpoint = pinned(manifest)
    assert isinstance(checkpoint.files, PinnedFiles)
    assert checkpoint.fingerprint == manifest.fingerprint
    assert len(checkpoint.block_parts(0, 4)) == 4
    assert hub.requests == []


def test_weights_come_from_the_hub_as_always(hub: LocalHub, manifest: Manifest, folder: Path) -> None:
    checkpoint = pinned(manifest)
    read = checkpoint.read(checkpoint.block_keys(1, 3))
    whole = {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}
    assert len(read) == 18
    assert all(torch.equal(value, whole[key]) for key, value in read.items())


def test_a_pinned_model_computes_the_same(hub: LocalHub, manifest: Manifest, folder: Path) -> None:
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    stage, local = Stage.load(pinned(manifest), 0, 2), Stage.load(Checkpoint.open(folder), 0, 2)
    assert torch.equal(
        stage.forward(hidden, stage.new_cache(0, 2)), local.forward(hidden, local.new_cache(0, 2))
    )


def test_another_file_on_the_hub_is_refused(
    hub: LocalHub, manifest: Manifest, folder: Path, tmp_path: Path
) -> None:
    hub.repos["some/llama"] = make_checkpoint(
        tmp_path, "llama", num_blocks=4, shards=2, seed=6, hidden_size=64
    )
    checkpoint = pinned(manifest)
    with pytest.raises(ModelError, match=r"is not the file that the fingerprint \w+ means"):
        checkpoint.fetch(0, 1)


def test_another_file_in_the_hubs_cache_is_not_used(
    hub: LocalHub, manifest: Manifest, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    hub.repos["some/llama"] = make_checkpoint(
        tmp_path, "llama", num_blocks=4, shards=2, seed=6, hidden_size=64
    )
    for shard in manifest.files:
        hf_hub_download("some/llama", shard, revision=COMMIT)
    checkpoint = pinned(manifest)
    assert not any(checkpoint.files.has(part) for part in checkpoint.block_parts(0, 4))  # type: ignore[attr-defined]


def test_blocks_from_before_the_fingerprint_was_given_are_used(
    hub: LocalHub, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Checkpoint.open("some/llama", progress=False)
    before.fetch(0, 2)
    unplug(monkeypatch)
    checkpoint = pinned(manifest)
    assert set(checkpoint.read(checkpoint.block_keys(0, 2))) == set(before.block_keys(0, 2))


def test_offline_the_last_fingerprint_stands_for_the_name(
    hub: LocalHub, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(manifest)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    unplug(monkeypatch)
    assert Checkpoint.open("some/llama", progress=False).fingerprint == manifest.fingerprint
    with pytest.raises(ModelError, match="neither in the store"):
        Checkpoint.open("some/other", progress=False)


def test_with_a_hub_the_hub_says_what_a_name_means(
    hub: LocalHub, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(manifest)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert not isinstance(Checkpoint.open("some/llama", progress=False).files, PinnedFiles)
    assert "config.json" in hub.fetched


def test_a_damaged_manifest_is_not_used(hub: LocalHub, manifest: Manifest) -> None:
    path = keep_manifest(BlockStore(), manifest)
    path.write_bytes(path.read_bytes().replace(b"llama", b"lama!", 1))
    assert find_manifest(BlockStore(), manifest.fingerprint) is None


def test_without_a_manifest_the_hub_says_what_the_model_is_and_must_agree(hub: LocalHub) -> None:
    with pytest.raises(ModelError, match=f"not {'0' * 32}: it has changed, or"):
        Checkpoint.open("some/llama", fingerprint="0" * 32, progress=False)


def test_a_folder_must_have_the_fingerprint_too(folder: Path) -> None:
    right = Checkpoint.open(folder).fingerprint
    assert Checkpoint.open(folder, fingerprint=right).fingerprint == right
    with pytest.raises(ModelError, match="has the fingerprint"):
        Checkpoint.open(folder, fingerprint="0" * 32)


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "../" * 10 + "aa", "G" * 32])
def test_what_is_no_fingerprint_is_said(text: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="is not a fingerprint"):
        Checkpoint.open(folder, fingerprint=text)


# hashes of blocks


@pytest.fixture
def full(hub: LocalHub) -> Manifest:
    """The manifest with hashes of blocks; the store has nothing else."""
    manifest = Checkpoint.open("some/llama", progress=False).make_full_manifest()
    shutil.rmtree(BlockStore().root)
    keep_manifest(BlockStore(), manifest)
    hub.requests.clear()
    return manifest


def test_all_machines_hash_the_blocks_alike(
    hub: LocalHub, full: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    for shard in full.files:  # a machine that has whole files in the Hub's cache, and no store
        hf_hub_download("some/llama", shard, revision=COMMIT)
    monkeypatch.setenv("SWARMKIT_STORE_DIR", str(tmp_path / "other"))
    other = Checkpoint.open("some/llama", progress=False)
    assert other.make_full_manifest().blocks == full.blocks
    assert not list((tmp_path / "other" / "blobs").glob("*"))


def test_a_block_is_hashed_once(hub: LocalHub, full: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download

    for shard in full.files:
        hf_hub_download("some/llama", shard, revision=COMMIT)
    Checkpoint.open("some/llama", progress=False).make_full_manifest()
    monkeypatch.setattr("swarmkit.models.checkpoint.store_hub.hash_of_part", None)
    assert Checkpoint.open("some/llama", progress=False).make_full_manifest() == full


def test_a_block_from_the_hub_must_have_the_hash_that_the_fingerprint_covers(
    hub: LocalHub, full: Manifest
) -> None:
    lie = replace(full, blocks=("12" * 32, *full.blocks[1:]))
    keep_manifest(BlockStore(), lie)
    checkpoint = Checkpoint.open("some/llama", fingerprint=lie.full_fingerprint, progress=False)
    checkpoint.fetch(1, 2)
    with pytest.raises(ModelError, match=r"block 0 of .* other bytes than the fingerprint"):
        checkpoint.fetch(0, 1)


def test_a_manifest_with_hashes_of_other_blocks_is_refused(hub: LocalHub, full: Manifest) -> None:
    lie = replace(full, blocks=full.blocks[:1])
    keep_manifest(BlockStore(), lie)
    with pytest.raises(ModelError, match="hashes of 1 blocks, and some/llama has 4"):
        Checkpoint.open("some/llama", fingerprint=lie.full_fingerprint, progress=False)


def test_blocks_from_before_the_full_fingerprint_was_given_are_used(
    hub: LocalHub, full: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Checkpoint.open("some/llama", progress=False)
    before.fetch(0, 2)
    unplug(monkeypatch)
    checkpoint = Checkpoint.open("some/llama", fingerprint=full.full_fingerprint, progress=False)
    assert set(checkpoint.read(checkpoint.block_keys(0, 2))) == set(before.block_keys(0, 2))


def test_weights_of_a_folder_have_no_hashes_of_blocks_and_the_error_says_why(folder: Path) -> None:
    with pytest.raises(ModelError, match="not weights of a folder"):
        Checkpoint.open(folder).make_full_manifest()
