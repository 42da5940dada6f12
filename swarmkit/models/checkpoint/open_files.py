"""Finding the files of a model: in the package, in a folder, or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.files import PACKAGED, Files, LocalFiles
from swarmkit.models.checkpoint.store_hub import HubFiles
from swarmkit.models.checkpoint.store_pinned import open_last_pinned, open_pinned


def is_hub_name(model: str) -> bool:
    """Whether `model` can only be the name of a repository on the Hub."""
    path = Path(model).expanduser()
    elsewhere = path.exists() or path.is_absolute() or model.startswith((".", "~"))
    return model != PACKAGED and not elsewhere and model.count("/") <= 1 and "\\" not in model


def open_files(
    model: str,
    *,
    revision: str | None,
    token: str | None,
    fingerprint: str | None = None,
    progress: bool = True,
) -> Files:
    """The files of `model`: "tiny-chat", a folder, or a Hub name; see `Checkpoint.open`.

    Whether they have the given fingerprint is not checked, unless the store has its manifest.
    """
    if model == PACKAGED:
        from swarmkit.tinychat import CHECKPOINT

        folder = Path(CHECKPOINT)
        if not (folder / "config.json").is_file():
            raise ModelError(f"The packaged model tiny-chat is not in {folder}. Install swarmkit again.")
        return LocalFiles(folder, progress=progress)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} has no config.json, so it is not a transformers checkpoint. "
                "Give the folder that `save_pretrained` wrote (or one snapshot inside the Hub's cache)."
            )
        return LocalFiles(folder, progress=progress)
    if folder.is_file():
        raise ModelError(f"{folder} is a file. Give the folder with config.json and the safetensors files.")
    if not is_hub_name(model):
        raise ModelError(
            f"There is no folder {folder}. Check the path; a Hub name looks like Qwen/Qwen3-8B, "
            "and the packaged model is called tiny-chat."
        )
    if fingerprint is not None:
        pinned = open_pinned(model, fingerprint, token, progress=progress)
        if pinned is not None:
            return pinned
    try:
        return HubFiles(model, revision, token, progress=progress)
    except ModelError:
        # Offline, the last fingerprint that was given for a name stands for it, as its last commit does.
        pinned = open_last_pinned(model, token, progress=progress) if revision is None else None
        if pinned is None or fingerprint is not None:
            raise
        return pinned
