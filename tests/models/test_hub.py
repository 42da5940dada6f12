"""Loading from the Hub: only the bytes that are needed come, and every failure says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.ranges import RetryPolicy
from swarmkit.models.checkpoint.store_fetch import ATTEMPTS
from swarmkit.models.checkpoint.store_hub import HubFiles
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import build_head

from .hub import COMMIT, TOKEN, LocalHub, local_hub, unplug, use_hub
from .tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
WAITS: list[float] = []
PATIENCE = RetryPolicy(attempts=3, sleep=WAITS.append)


@pytest.fixture(scope="module")
def folder(checkpoints: Path) -> Path:
    """Eight blocks, wide enough that headers and indices are small beside them, in four shards."""
    return make_checkpoint(
        checkpoints, "llama", num_blocks=8, shards=4, seed=3, hidden_size=192, intermediate_size=320
    )


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    WAITS.clear()
    with local_hub({"some/llama": folder}) as hub:
        use_hub(hub, tmp_path / "home", monkeypatch)
        yield hub


def opened(name: str = "some/llama", **options: Any) -> Checkpoint:
    checkpoint = Checkpoint.open(name, progress=False, **options)
    checkpoint.files.retry = PATIENCE  # type: ignore[attr-defined]
    return checkpoint


def truth(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}


def same(read: dict[str, torch.Tensor], folder: Path) -> bool:
    """Whether these are tensors of the checkpoint, and there are any."""
    whole = truth(folder)
    return bool(read) and all(torch.equal(value, whole[key]) for key, value in read.items())


def bytes_of_blocks(folder: Path, start: int, stop: int) -> int:
    whole = truth(folder)
    return sum(whole[key].nbytes for key in Checkpoint.open(folder).block_keys(start, stop))


# ---------------------------------------------------------------------- what comes over the wire


def test_two_blocks_of_four_shards_cost_their_bytes_and_one_percent(hub: LocalHub, folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) >= 4
    checkpoint = opened()
    keys = checkpoint.block_keys(3, 5)
    Stage.load(checkpoint, 3, 5)
    assert hub.sent() <= 1.01 * bytes_of_blocks(folder, 3, 5)  # with configs, indices and headers
    assert same(checkpoint.read(keys), folder)


def test_tensors_that_lie_together_come_in_one_request(hub: LocalHub) -> None:
    opened().fetch(2, 4)
    data = [r for r in hub.requests if r.name.endswith(".safetensors") and r.sent > 10_000]
    assert len(data) <= 3  # two blocks in one or two shards, not 18 tensors


def test_what_is_there_is_not_fetched_again(hub: LocalHub, folder: Path) -> None:
    opened().fetch(2, 4)
    sent = hub.sent(".safetensors")
    checkpoint = opened()
    checkpoint.fetch(2, 4)
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)
    assert hub.sent(".safetensors") == sent


def test_a_server_and_a_stranger_with_the_folder_agree_on_the_fingerprint(
    hub: LocalHub, folder: Path
) -> None:
    assert opened().fingerprint == Checkpoint.open(folder).fingerprint
    assert hub.sent(".safetensors") == 0


def test_a_client_fetches_what_is_in_no_block(hub: LocalHub, folder: Path) -> None:
    checkpoint = opened()
    build_head(checkpoint, torch.nn.Identity())
    whole = truth(folder)
    head = sum(whole[key].nbytes for key in checkpoint.head_keys())
    assert hub.sent(".safetensors") <= head + 10_000


def test_progress_is_told_in_bytes(hub: LocalHub, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    opened().fetch(0, 2, on_bytes=lambda done, total: told.append((done, total)))
    total = bytes_of_blocks(folder, 0, 2)
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert told == sorted(told)


def test_a_model_in_a_single_file_needs_only_its_header(
    hub: LocalHub, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = make_checkpoint(checkpoints, "qwen3", num_blocks=2)
    hub.repos["some/qwen"] = single
    checkpoint = opened("some/qwen")
    assert same(checkpoint.read(checkpoint.block_keys(1, 2)), single)
    assert hub.sent("model.safetensors") < (single / "model.safetensors").stat().st_size * 0.7
    unplug(monkeypatch)
    again = opened("some/qwen")
    assert again.fingerprint == Checkpoint.open(single).fingerprint
    assert same(again.read(again.block_keys(1, 2)), single)


def test_weights_in_the_hubs_own_cache_are_read_from_there(hub: LocalHub, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    checkpoint = opened()
    for shard in set(checkpoint.weight_map.values()):
        hf_hub_download("some/llama", shard, revision=COMMIT)
    sent = hub.sent()
    assert same(checkpoint.read(checkpoint.block_keys(0, 8)), folder)
    assert hub.sent() == sent
    assert not list((HubFiles("some/llama", None, None).store.root / "blobs").glob("*"))


def test_a_redirect_to_a_storage_host_with_its_own_etags_is_followed(hub: LocalHub, folder: Path) -> None:
    hub.cdn = True
    hub.cut_after = [30_000]
    checkpoint = opened()
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)
    assert hub.sent(".safetensors") <= 1.01 * bytes_of_blocks(folder, 2, 4)


# ---------------------------------------------------------------------- when something goes wrong


def test_after_a_cut_the_rest_is_asked_for_from_where_it_stopped(hub: LocalHub, folder: Path) -> None:
    hub.cut_after = [100_000, 70_001]
    checkpoint = opened()
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)
    assert hub.sent(".safetensors") <= 1.01 * bytes_of_blocks(folder, 2, 4)
    assert len(WAITS) == 2


def test_what_came_before_a_crash_is_not_fetched_again(hub: LocalHub, folder: Path) -> None:
    hub.cut_after = [300_000, 10, 10, 10, 10]
    with pytest.raises(ModelError, match=r"could not be fetched.*after 3 attempts.*go on from there"):
        opened().fetch(2, 4)
    assert 300_000 <= hub.sent(".safetensors") < 320_000
    hub.cut_after = []
    checkpoint = opened()
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)
    assert hub.sent(".safetensors") <= 1.01 * bytes_of_blocks(folder, 2, 4)


def test_a_busy_hub_is_asked_again_later_and_later(hub: LocalHub, folder: Path) -> None:
    hub.busy = 2
    checkpoint = opened()
    assert same(checkpoint.read(checkpoint.block_keys(2, 3)), folder)
    assert WAITS == [0.5, 1.0]


def test_a_server_without_ranges_is_streamed_through_once(hub: LocalHub, folder: Path) -> None:
    hub.ranges = False
    checkpoint = opened()
    checkpoint.fetch(0, 8)
    assert same(checkpoint.read(checkpoint.block_keys(0, 8)), folder)
    content = [r.name for r in hub.requests if r.name.endswith(".safetensors") and r.sent]
    shards = {checkpoint.weight_map[key] for key in checkpoint.block_keys(0, 8)}
    assert len(content) <= 3 * len(shards)  # the header's length, the header, the rest
    assert all(r.status == 200 for r in hub.requests if r.name.endswith(".safetensors"))


def test_without_ranges_a_spoilt_file_does_not_have_its_hash(hub: LocalHub, folder: Path) -> None:
    checkpoint = opened()
    for shard in sorted(set(checkpoint.weight_map.values())):
        checkpoint.files.header(shard)  # type: ignore[attr-defined]
    hub.ranges, hub.spoil = False, 1
    checkpoint = opened()
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)
    assert len(WAITS) == 1


def test_another_range_than_the_one_asked_for_is_refused(hub: LocalHub, folder: Path) -> None:
    hub.wrong_range = 1
    checkpoint = opened()
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)
    assert len(WAITS) == 1


def test_a_spoilt_range_is_found_where_all_of_the_shard_is_there(hub: LocalHub, folder: Path) -> None:
    hub.spoil = 1
    checkpoint = opened()
    checkpoint.fetch(0, 8, head=True)
    assert same(checkpoint.read(checkpoint.weight_map), folder)


def test_a_spoilt_header_is_fetched_again(hub: LocalHub, folder: Path) -> None:
    hub.spoil, hub.spoil_from = 1, 1000  # in the middle of a tensor's name, as it happens
    checkpoint = opened()
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)


def test_a_range_that_is_always_spoilt_is_given_up(hub: LocalHub) -> None:
    hub.spoil = 1000
    with pytest.raises(ModelError, match=r"fetched 3 times and never had the hash"):
        opened().fetch(0, 8, head=True)


def test_a_spoilt_range_is_found_where_the_block_was_here_before(hub: LocalHub, folder: Path) -> None:
    checkpoint = opened()
    checkpoint.fetch(2, 3)
    checkpoint.files.store.blob(checkpoint.block_content(2)).unlink()  # type: ignore[attr-defined]
    hub.spoil = 1
    again = opened()
    assert same(again.read(again.block_keys(2, 3)), folder)
    again.files.store.blob(again.block_content(2)).unlink()  # type: ignore[attr-defined]
    hub.spoil = 1000
    with pytest.raises(ModelError, match=f"came {ATTEMPTS} times with other bytes"):
        opened().fetch(2, 3)


def test_a_file_that_changes_meanwhile_is_noticed(hub: LocalHub, checkpoints: Path, tmp_path: Path) -> None:
    changing = make_checkpoint(tmp_path, "llama", num_blocks=2, seed=5)
    hub.repos["some/changing"] = changing
    checkpoint = opened("some/changing")
    _ = checkpoint.weight_map
    file = changing / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="has changed on the Hub"):
        checkpoint.fetch(0, 1)


def test_a_file_that_shrinks_meanwhile_is_noticed(hub: LocalHub, tmp_path: Path) -> None:
    changing = make_checkpoint(tmp_path, "llama", num_blocks=2, seed=5)
    hub.repos["some/changing"] = changing
    hub.cdn = True  # whose ETag would not tell
    checkpoint = opened("some/changing")
    _ = checkpoint.weight_map
    file = changing / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="has changed on the Hub"):
        checkpoint.fetch(1, 2)


# ---------------------------------------------------------------------- access


def test_a_gated_repository_opens_with_its_token_and_is_not_public(hub: LocalHub, folder: Path) -> None:
    hub.gated = {"some/llama"}
    with pytest.raises(ModelError, match="HF_TOKEN"):
        opened()
    checkpoint = opened(token=TOKEN)
    assert same(checkpoint.read(checkpoint.block_keys(0, 1)), folder)
    assert all(r.authorized for r in hub.requests if r.sent)
    assert not checkpoint.files.is_public  # type: ignore[attr-defined]
    hub.gated = set()
    assert opened().files.is_public  # type: ignore[attr-defined]


def test_a_revision_is_pinned_to_its_commit(hub: LocalHub) -> None:
    checkpoint = opened(revision="main")
    assert checkpoint.files.commit == COMMIT  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="no revision 'v2'"):
        opened(revision="v2")


def test_offline_the_store_serves_what_it_has_and_names_what_it_lacks(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = opened()
    online.fetch(2, 4)
    mine = online.fingerprint
    unplug(monkeypatch)
    asked = len(hub.requests)
    checkpoint = opened()
    assert checkpoint.fingerprint == mine
    assert same(checkpoint.read(checkpoint.block_keys(2, 4)), folder)
    with pytest.raises(ModelError, match=r"^block 4, block 5 of some/llama@c0ffee.*HF_HUB_OFFLINE is set"):
        checkpoint.fetch(2, 6)
    assert len(hub.requests) == asked


def test_failures_say_what_to_do(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    hub.repos |= {"some/gated": None, "some/empty": empty, "some/bare": bare}
    advice = {
        "some/typo": "Check the spelling",
        "some/gated": "HF_TOKEN",
        "some/empty": r"no config\.json",
        "some/bare": r"neither model\.safetensors nor",
    }
    for name, part in advice.items():
        with pytest.raises(ModelError, match=part):
            opened(name)


# ---------------------------------------------------------------------- PyTorch's own files


def as_pickles(folder: Path, target: Path, shards: int) -> Path:
    """The checkpoint as `pytorch_model.bin`, in one or several files."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = sorted(truth(folder).items())
    if shards == 1:
        torch.save(dict(whole), target / "pytorch_model.bin")
        return target
    weight_map = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        torch.save(dict(whole[shard::shards]), target / name)
        weight_map |= dict.fromkeys(dict(whole[shard::shards]), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_become_the_same_parts(
    hub: LocalHub, checkpoints: Path, tmp_path: Path, shards: int
) -> None:
    folder = make_checkpoint(checkpoints, "llama", num_blocks=2)
    hub.repos |= {"some/new": folder, "some/old": as_pickles(folder, tmp_path / "old", shards)}
    old, new = opened("some/old"), opened("some/new")
    assert same(old.read(old.block_keys(1, 2)), folder)
    new.fetch(1, 2)
    assert old.block_content(1) == new.block_content(1) is not None
    assert old.fingerprint == Checkpoint.open(tmp_path / "old").fingerprint
    local = Checkpoint.open(tmp_path / "old")
    assert same(local.read(local.weight_map), folder)


# ---------------------------------------------------------------------- the real environment variables

STEPS = """
import sys
from swarmkit.models.checkpoint.checkpoint import Checkpoint
checkpoint = Checkpoint.open(sys.argv[1], progress=False)
checkpoint.fetch(2, 3)
print(checkpoint.fingerprint, checkpoint.files.store.root)
"""


@pytest.mark.slow
def test_endpoint_home_and_store_are_taken_from_the_environment(
    hub: LocalHub, folder: Path, tmp_path: Path
) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    store = tmp_path / "elsewhere"
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    own |= {"SWARMKIT_STORE_DIR": str(store), "SWARMKIT_STORE_MAX_BYTES": "50GB", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, "some/llama"],
        env=clean | own,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [Checkpoint.open(folder).fingerprint, str(store)]
    assert len(list((store / "blobs").iterdir())) == 1
