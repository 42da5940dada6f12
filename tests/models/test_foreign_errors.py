"""Errors of other libraries, as users are told of them: without unsafe advice, and disks by name."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swarmkit.errors import ModelError, UsageError
from swarmkit.models import check
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.foreign_errors import disk_trouble, reason_of

from .tiny import make_checkpoint, tiny_config

SWITCHES = ("trust_remote_code", "weights_only", "False`")


class NoTensor:
    pass


def told(folder: Path) -> str:
    def read() -> None:
        checkpoint = Checkpoint.open(folder)
        checkpoint.read(checkpoint.weight_map)

    with pytest.raises(ModelError) as raised:
        read()
    return str(raised.value)


@pytest.mark.parametrize("content", [{"a": NoTensor()}, {"a": print}], ids=["object", "function"])
def test_a_pickle_with_more_than_weights_is_refused_without_advice_to_open_it(
    content: object, checkpoints: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(checkpoints, "llama", num_blocks=1)
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        torch.save(content, file) if isinstance(content["a"], NoTensor) else pickle.dump(content, file)  # type: ignore[index]
    message = told(tmp_path)
    assert "could run code" in message
    assert not any(switch in message for switch in SWITCHES)


def test_a_config_that_needs_foreign_code_is_refused_without_advice_to_run_it(tmp_path: Path) -> None:
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration.py").write_text("raise SystemExit('run')")
    message = told(tmp_path)
    assert "swarmkit runs no code from repositories" in message
    assert not any(switch in message for switch in SWITCHES)


def test_other_reasons_are_told_in_one_line() -> None:
    assert reason_of(ValueError("a\n  b")) == "a b"


# full disks


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_safetensors_on_a_full_disk_is_trouble_of_the_disk(full: Path) -> None:
    with pytest.raises(Exception) as raised:
        save_file({"a": torch.zeros(100_000)}, full / "model.safetensors")
    assert disk_trouble(raised.value) == "No space left on device"


def test_a_check_on_a_full_disk_says_so_and_nothing_of_the_model(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(full))
    with pytest.raises(UsageError, match="No space left on device") as raised:
        check.check_architecture(tiny_config("llama"))
    assert not isinstance(raised.value, ModelError)


def test_a_folder_for_temporary_files_that_is_missing_is_trouble_of_the_disk() -> None:
    error = FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
    assert disk_trouble(error) == "no folder for temporary files can be written to"


def test_trouble_is_found_behind_another_error() -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk_trouble(error) == "No space left on device"


def test_other_errors_are_no_trouble_of_the_disk() -> None:
    assert disk_trouble(ValueError("no")) is None


def test_a_store_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    from swarmkit.models.checkpoint.store import BlockStore

    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"file/store cannot be written to.*SWARMKIT_STORE_DIR"):
        BlockStore(tmp_path / "file" / "store").open("0" * 64)
