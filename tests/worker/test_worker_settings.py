"""What the person has chosen survives crashes, and what cannot be read is kept aside."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from swarmkit.errors import UsageError
from swarmkit.worker.places import write_atomically
from swarmkit.worker.settings import WorkerSettings, changed, load_settings, save_settings

BROKEN = {
    "cut off": b'{"agreed": tr',
    "empty": b"",
    "not text": b"\x00\xff\x00\xff",
    "of another kind": b"[1, 2]",
    "with a name that is unknown": b'{"agred": true}',
    "with a value that is not allowed": b'{"limits": {"cpu_cores": {"in_use": -1, "away": 1}}}',
    "nested without end": b"[" * 100_000,
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    settings = changed(WorkerSettings(), {"agreed": True, "rules": {"programs": ["blender"]}})
    save_settings(tmp_path / "worker.json", settings)
    assert load_settings(tmp_path / "worker.json").settings == settings


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_kept_aside_and_nothing_is_served(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "worker.json"
    path.write_bytes(data)
    loaded = load_settings(path)
    kept = tmp_path / "worker.json.unusable"
    assert (loaded.settings.agreed, kept.read_bytes(), path.exists()) == (False, data, False)
    assert str(kept) in loaded.trouble


def test_settings_without_some_values_have_the_defaults_for_them(tmp_path: Path) -> None:
    """As those of an older version have."""
    (tmp_path / "worker.json").write_text('{"agreed": true, "serve": {"model": "tiny-chat"}}')
    loaded = load_settings(tmp_path / "worker.json")
    assert (loaded.settings.agreed, loaded.settings.rules) == (True, WorkerSettings().rules)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "worker.json"
    save_settings(path, WorkerSettings())
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_settings(path, changed(WorkerSettings(), {"agreed": True}))
    assert (path.read_bytes(), [*tmp_path.iterdir()]) == (before, [path])


def test_a_file_is_for_its_owner_only(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", b"x")
    assert (tmp_path / "new" / "file").stat().st_mode & 0o077 == 0


def test_the_file_is_readable_text(tmp_path: Path) -> None:
    save_settings(tmp_path / "worker.json", WorkerSettings())
    assert json.loads((tmp_path / "worker.json").read_text())["rules"]["away_after_s"] == 300.0


@pytest.mark.parametrize("changes", [{"rules": 3}, {"rules": {"schedule": {"monday": "x" * 24}}}, {"x": 1}])
def test_changes_that_are_not_allowed_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        changed(WorkerSettings(), changes)


def test_a_new_worker_never_begins_by_itself() -> None:
    assert not WorkerSettings().agreed
