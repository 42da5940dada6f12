"""Finding a checkpoint, reading parts of it, and its fingerprint."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import pytest
import torch
from safetensors.torch import load_file, save_file

from swarmkit.errors import ModelError, UsageError
from swarmkit.models import remembered
from swarmkit.models.checkpoint import fingerprint as fingerprints
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.plan import block_bytes, cache_cost

from .tiny import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama", num_blocks=4, shards=3)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_tells_the_shape_of_its_model(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.model_type, checkpoint.num_blocks, checkpoint.hidden_size) == ("llama", 4, 32)
    assert checkpoint.name == str(folder)
    assert Checkpoint.open(checkpoint) is checkpoint


def test_every_tensor_is_either_in_one_block_or_in_the_head(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    parts = [set(checkpoint.block_keys(block, block + 1)) for block in range(4)] + [
        set(checkpoint.head_keys())
    ]
    assert set().union(*parts) == set(checkpoint.weight_map)
    assert sum(map(len, parts)) == len(checkpoint.weight_map)


def test_blocks_are_renumbered_from_0(folder: Path) -> None:
    keys = Checkpoint.open(folder).block_keys(2, 4)
    assert keys["model.layers.2.mlp.up_proj.weight"] == "layers.0.mlp.up_proj.weight"
    assert keys["model.layers.3.mlp.up_proj.weight"] == "layers.1.mlp.up_proj.weight"
    assert set(Checkpoint.open(folder).head_keys()) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_only_the_asked_tensors_are_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.read(["model.norm.weight"])) == {"model.norm.weight"}
    with pytest.raises(ModelError, match=r"no tensor 'model\.nonsense'"):
        checkpoint.read(["model.nonsense"])
    with pytest.raises(UsageError, match="has 4 blocks"):
        checkpoint.block_keys(3, 5)


def test_the_fingerprint_is_of_the_content_not_the_place(folder: Path, tmp_path: Path) -> None:
    there = shutil.copytree(folder, tmp_path / "elsewhere")
    edit_config(there, transformers_version="0.0", _name_or_path="x", torch_dtype="float16", dtype="float16")
    first = Checkpoint.open(folder).fingerprint
    assert first == Checkpoint.open(folder).fingerprint == Checkpoint.open(there).fingerprint
    assert len(first) == 32
    assert int(first, 16) >= 0


def test_the_fingerprint_changes_with_one_config_value(folder: Path) -> None:
    before = Checkpoint.open(folder).fingerprint
    edit_config(folder, rms_norm_eps=1e-4)
    assert Checkpoint.open(folder).fingerprint != before


def test_the_fingerprint_changes_with_one_weight(folder: Path) -> None:
    before = Checkpoint.open(folder).fingerprint
    shard = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert Checkpoint.open(folder).fingerprint != before


def test_a_file_is_hashed_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        os.utime(shard, (1_000_000_000, 1_000_000_000))
    before = Checkpoint.open(folder).fingerprint
    hashed: list[int] = []
    sha256 = fingerprints.hashlib.sha256
    monkeypatch.setattr(
        fingerprints.hashlib, "sha256", lambda *data: hashed.append(len(data)) or sha256(*data)
    )
    assert Checkpoint.open(folder).fingerprint == before
    assert hashed == [1]  # the digest itself, no file
    os.utime(shards[0], (1_000_000_001, 1_000_000_001))
    assert Checkpoint.open(folder).fingerprint == before
    assert hashed == [1, 0, 1] or hashed == [1, 1, 0]


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    fingerprints.file_sha256(shard)
    assert fingerprints.recall(str(shard.resolve())) is None


def test_where_the_cache_folder_is_a_file_nothing_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "a file"))
    fingerprints.remember("key", 1)
    assert fingerprints.recall("key") is None


def test_what_is_remembered_at_the_same_time_stays() -> None:
    keys = [f"key {number}" for number in range(12)]
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(fingerprints.remember, keys, range(len(keys))))
    assert [fingerprints.recall(key) for key in keys] == list(range(len(keys)))


def test_what_was_remembered_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST_REMEMBERED", 2)
    for key in ("a", "b", "a", "c"):
        fingerprints.remember(key, key)
    assert [fingerprints.recall(key) for key in "abc"] == ["a", None, "c"]


def test_a_folder_without_all_shards_has_no_fingerprint(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="needs all"):
        _ = Checkpoint.open(folder).fingerprint


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_a_damaged_bin(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").touch()


def without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def of_another_kind(folder: Path) -> None:
    edit_config(folder, model_type="mamba")


def of_an_unknown_kind(folder: Path) -> None:
    edit_config(folder, model_type="frobnicator")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, r"no config\.json"),
        (without_weights, r"neither model\.safetensors nor"),
        (of_another_kind, r"cannot be cut.*state-space.*llama"),
        (of_an_unknown_kind, r"config\.json of .* cannot be used.*frobnicator"),
    ],
)
def test_what_cannot_be_opened_says_why(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(folder)


def test_a_damaged_bin_says_so(folder: Path) -> None:
    with_a_damaged_bin(folder)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*damaged"):
        _ = Checkpoint.open(folder).weight_map


def test_a_folder_with_bin_files_reads_as_one_with_safetensors(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "old"
    there.mkdir()
    shutil.copy(folder / "config.json", there)
    checkpoint = Checkpoint.open(folder)
    torch.save(checkpoint.read(checkpoint.weight_map), there / "pytorch_model.bin")
    old = Checkpoint.open(there)
    assert old.block_keys(1, 3) == checkpoint.block_keys(1, 3)
    for key, value in old.read(old.weight_map).items():
        assert torch.equal(value, checkpoint.read([key])[key])


def test_a_folder_needs_no_fetching(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_STORE_DIR", str(tmp_path / "store"))
    checkpoint = Checkpoint.open(folder)
    checkpoint.fetch(0, 4, head=True)
    checkpoint.read(checkpoint.weight_map)
    assert checkpoint.block_content(0) is None
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="There is no folder"):
        Checkpoint.open(name)


def test_a_damaged_shard_says_so(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged"):
        Checkpoint.open(folder).read(["model.norm.weight"])


def test_a_checkpoint_of_the_bare_base_model_has_the_same_keys_for_the_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3", num_blocks=2)
    bare = {
        key.removeprefix("model."): value for key, value in load_file(folder / "model.safetensors").items()
    }
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.head_keys().values()) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert "layers.0.mlp.up_proj.weight" in checkpoint.block_keys(1, 2).values()


def test_half_the_bytes_for_half_the_width(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert block_bytes(checkpoint, torch.float32) == 2 * block_bytes(checkpoint, torch.float16)
    assert cache_cost(checkpoint, torch.bfloat16).token_bytes == 2 * 2 * 8 * 2
