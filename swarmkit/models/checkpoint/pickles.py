"""Weights in PyTorch's own files (`pytorch_model.bin`), read without running what is in them.

Such a file is a pickle, which could run any code when it is opened. `weights_only` lets it make tensors and
nothing else; a file that wants more is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.foreign_errors import reason_of


def open_pickle(path: Path, name: str) -> dict[str, Tensor]:
    """Open the tensors of a file, which stay on disk until they are used.

    Raises:
        ModelError: it is damaged, or holds anything but tensors.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Written by a PyTorch before 1.6: these files have to be read as a whole.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path.name} of {name} holds more than weights, or is damaged, and was not opened, as it could "
            "run code. Use a checkpoint with safetensors files."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path.name} of {name} is damaged ({reason_of(error)}); download it again."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ModelError(
            f"{path.name} of {name} is not a table of weights. Use a checkpoint with safetensors files."
        )
    return content
