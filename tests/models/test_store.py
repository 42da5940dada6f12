"""The store of parts: named by content, bounded, shared by processes; and the arithmetic of ranges."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.byte_ranges import ByteRange, coalesce, merge, subtract
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.pickles import open_pickle
from swarmkit.models.checkpoint.store import SPARE_BYTES, BlockStore
from swarmkit.models.checkpoint.store_format import (
    FormatError,
    TensorPlace,
    header_length,
    lay_out,
    parse_header,
    read_header,
    sha256_of,
)
from swarmkit.models.checkpoint.store_tensors import keep_tensors

from .hub import LocalHub, local_hub, use_hub
from .tiny import make_checkpoint

ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------------- ranges

spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda s: ByteRange(s[0], s[0] + s[1]))
)


def covered(some: list[ByteRange]) -> set[int]:
    return {byte for span in some for byte in range(span.start, span.stop)}


@given(spans, spans)
def test_what_is_missing_is_what_is_wanted_and_not_had(wanted: list[ByteRange], had: list[ByteRange]) -> None:
    missing = subtract(wanted, had)
    assert covered(missing) == covered(wanted) - covered(had)
    assert missing == merge(missing)


@given(spans, st.integers(0, 30))
def test_requests_hold_what_is_wanted_and_little_else(wanted: list[ByteRange], spare: int) -> None:
    requests = coalesce(wanted, spare)
    assert covered(wanted) <= covered(requests)
    assert len(covered(requests)) - len(covered(wanted)) <= spare
    assert len(requests) <= len(merge(wanted))


def test_the_smallest_gaps_are_bridged_first() -> None:
    assert coalesce([ByteRange(0, 10), ByteRange(15, 20), ByteRange(22, 30)], 3) == [
        ByteRange(0, 10),
        ByteRange(15, 30),
    ]


# ---------------------------------------------------------------------- the format


def front(entries: object, data: int = 0) -> tuple[bytes, int]:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + data


def one(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (one(dtype="F31"), "dtype 'F31' is not known"),
        (one(data_offsets=[4, 12]), "outside the file"),
        (one(data_offsets=[-8, 0]), "lacks a dtype, shape or offsets"),
        (one(data_offsets=[8, 0]), "outside the file"),
        (one(data_offsets=[0]), "lacks"),
        (one(shape=[3]), "cannot have 8 bytes"),
        (one(shape=[-2]), "lacks"),
        (one(shape=[True, 2]), "lacks"),
        (one(shape=[1] * 40 + [2]), "41 dimensions"),
        (one(dtype="F4", shape=[1]), "does not end with a byte"),
        ({"a": 3}, "not described by an object"),
        ([], "not a JSON object"),
        ({**one(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "overlaps"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"{" * 5, "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_header_that_cannot_be_is_refused(entries: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_header(*front(entries, data=8))


def test_a_header_longer_than_the_file_or_the_limit_is_refused() -> None:
    for length, size in ((100, 50), (2**62, 2**63)):
        with pytest.raises(FormatError, match="cannot be"):
            header_length(struct.pack("<Q", length), size)


def test_our_layout_is_a_safetensors_file_whatever_the_order(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.arange(4, dtype=torch.bfloat16),
        "c": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 5),
    }
    hashes = set()
    for number, order in enumerate((list(tensors), list(reversed(tensors)))):
        store = BlockStore(tmp_path / str(number))
        keep_tensors(store, "some/model@1", "block 0", {key: tensors[key] for key in order})
        path = store.find("some/model@1", "block 0")
        assert path is not None
        hashes.add(path.name)
        read = load_file(path)
        assert {key: value.tolist() for key, value in read.items()} == {
            key: value.tolist() for key, value in tensors.items()
        }
        for place in read_header(path).places.values():
            assert (place.start - len(read_header(path).front)) % tensors[place.name].element_size() == 0
    assert len(hashes) == 1


def test_the_headers_of_real_files_are_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, 3), "y": torch.ones(5).half()}, tmp_path / "f", metadata={"format": "pt"})
    places = read_header(tmp_path / "f").places
    assert (places["x"].dtype, places["x"].shape, places["x"].nbytes) == ("F32", (2, 3), 24)
    assert lay_out(places.values()).places["y"].nbytes == 10


# ---------------------------------------------------------------------- the store


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "store", clock=Clock())


def put(store: BlockStore, part: str, size: int = 1000, fill: int | None = None) -> str:
    """A part of `size` bytes; its content."""
    partial = store.partial("m@1", part)
    store.reserve(partial, size)
    partial.write_bytes(bytes([(fill or sum(part.encode())) % 256]) * size)
    with partial.open("rb") as file:
        content = sha256_of(file)
    store.keep(partial, "m@1", part, content, "hub")
    return content


def here(store: BlockStore) -> set[str]:
    return {entry.part for entry in store.entries() if store.blob(entry.content).is_file()}


def test_a_part_is_found_by_source_and_name_and_by_content(store: BlockStore) -> None:
    content = put(store, "block 0")
    assert store.find("m@1", "block 0") == store.open(content) == store.blob(content)
    assert store.find("m@2", "block 0") is None
    assert store.open("0" * 64) is None


def test_the_same_content_of_two_sources_is_one_file(store: BlockStore) -> None:
    content = put(store, "block 0")
    assert store.link("other@2", "block 7", content, "peers") == store.blob(content)
    assert store.find("other@2", "block 7") == store.blob(content)
    assert len(list((store.root / "blobs").iterdir())) == 1


def test_a_damaged_file_is_put_aside_when_it_is_first_opened(store: BlockStore, tmp_path: Path) -> None:
    content = put(store, "block 0")
    path = store.blob(content)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    later = BlockStore(store.root)
    assert later.find("m@1", "block 0") is None
    assert not path.exists()
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_what_was_not_read_for_longest_goes_first(store: BlockStore) -> None:
    limited = BlockStore(store.root, max_bytes=3000, clock=Clock())
    contents = {part: put(limited, part) for part in ("block 0", "block 1", "block 2")}
    limited.find("m@1", "block 0")
    for content in contents.values():
        limited.release(content)
    put(limited, "block 3")
    assert here(limited) == {"block 0", "block 2", "block 3"}
    assert limited.used_bytes <= 3000


def test_what_is_in_use_stays_and_the_limit_holds(store: BlockStore) -> None:
    mine = BlockStore(store.root, max_bytes=2500)
    put(mine, "block 0")
    other = BlockStore(store.root, max_bytes=2500)  # as another process would
    put(other, "block 1")
    with pytest.raises(ModelError, match=r"limit is 2500 bytes.*SWARMKIT_STORE_MAX_BYTES"):
        put(other, "block 2")
    assert here(other) == {"block 0", "block 1"}


def test_a_file_is_in_use_no_longer_when_its_process_was_killed(store: BlockStore) -> None:
    content = put(store, "block 0")
    store.release(content)
    code = (
        "import sys, pathlib; from swarmkit.models.checkpoint.store import BlockStore\n"
        "store = BlockStore(pathlib.Path(sys.argv[1]))\n"
        "print(store.find('m@1', 'block 0'), flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        assert child.stdout.readline().strip() == str(store.blob(content))
        limited = BlockStore(store.root, max_bytes=1500)
        with pytest.raises(ModelError, match="in use"):
            put(limited, "block 1")
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    put(limited, "block 1")
    assert here(limited) == {"block 1"}


def test_an_interrupted_part_counts_and_can_be_evicted(store: BlockStore) -> None:
    limited = BlockStore(store.root, max_bytes=1500)
    abandoned = limited.partial("m@1", "block 8")
    limited.reserve(abandoned, 1000)
    assert limited.used_bytes == 1000
    with limited.fetching("m@1", "block 8"), pytest.raises(ModelError, match="in use"):
        put(limited, "block 0")
    put(limited, "block 0")
    assert not abandoned.exists()


def test_without_a_limit_some_of_the_disk_stays_free(store: BlockStore) -> None:
    full = BlockStore(store.root, free_bytes=lambda path: SPARE_BYTES + 500)
    with pytest.raises(ModelError, match="disk is full"):
        put(full, "block 0")
    put(full, "block 0", size=400)


def test_the_index_remembers_what_was_evicted(store: BlockStore) -> None:
    content = put(store, "block 0")
    store.blob(content).unlink()
    entry = store.entry("m@1", "block 0")
    assert entry is not None
    assert entry.content == content
    assert store.find("m@1", "block 0") is None


def test_a_damaged_index_is_no_index(store: BlockStore) -> None:
    put(store, "block 0")
    for path in (store.root / "index").iterdir():
        path.write_text('{"what": 1}')
    assert store.find("m@1", "block 0") is None
    assert store.entries() == []


def test_limits_and_place_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_STORE_DIR", str(tmp_path / "x"))
    monkeypatch.setenv("SWARMKIT_STORE_MAX_BYTES", "2GB")
    assert (BlockStore().root, BlockStore().max_bytes) == (tmp_path / "x", 2_000_000_000)


# ---------------------------------------------------------------------- two servers, one machine


@pytest.fixture
def hub(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub({"some/llama": make_checkpoint(checkpoints, "llama", num_blocks=4, shards=2)}) as hub:
        use_hub(hub, tmp_path / "home", monkeypatch)
        yield hub


def test_two_servers_on_a_machine_do_not_fetch_a_block_twice(hub: LocalHub) -> None:
    both = [Checkpoint.open("some/llama", progress=False) for _ in range(2)]
    failures: list[BaseException] = []
    gate = threading.Barrier(2)

    def fetch(checkpoint: Checkpoint, start: int, stop: int) -> None:
        try:
            gate.wait()
            checkpoint.fetch(start, stop)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [
        threading.Thread(target=fetch, args=(checkpoint, *blocks))
        for checkpoint, blocks in zip(both, [(0, 3), (1, 4)], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    size = sum(tensor.nbytes for tensor in both[0].read(both[0].block_keys(0, 4)).values())
    data = sum(r.sent for r in hub.requests if r.name.endswith(".safetensors") and r.sent > 4000)
    assert size <= data <= size * 1.01


def test_a_limit_too_small_for_the_blocks_says_so_before_anything_is_fetched(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMKIT_STORE_MAX_BYTES", "10000")
    checkpoint = Checkpoint.open("some/llama", progress=False)
    with pytest.raises(ModelError, match="do not fit into the store"):
        checkpoint.fetch(0, 4)
    assert all(r.sent < 4000 for r in hub.requests if r.name.endswith(".safetensors"))


# ---------------------------------------------------------------------- PyTorch's own files


class Bomb:
    """What an attacker puts into a pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_bomb_is_refused_unopened(tmp_path: Path, new_format: bool) -> None:
    marker, path = tmp_path / "it went off", tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": Bomb(marker)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ModelError, match=r"more than weights.*could run code"):
        open_pickle(path, "some/model")
    assert not marker.exists()


def test_files_of_an_old_pytorch_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(open_pickle(tmp_path / "old.bin", "m")["a"], torch.ones(2))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and so on", b"\x80\x04N."])
def test_a_damaged_pickle_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged|not a table"):
        open_pickle(tmp_path / "x.bin", "some/model")


def test_a_place_knows_its_bytes() -> None:
    assert TensorPlace("a", "F32", (2,), 10, 18).nbytes == 8
