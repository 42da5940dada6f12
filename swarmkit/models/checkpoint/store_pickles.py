"""Weights in PyTorch's own files (`pytorch_model.bin`), read without running what is in them.

Such a file is a pickle, which could run any code when it is opened. `weights_only` lets it make tensors and
nothing else; a file that wants more is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_format import FormatError, Place, lay_out, sha256_of

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def open_pickle(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file, which stay on disk until they are used.

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
            f"run code ({str(error).splitlines()[0]}). Use a checkpoint with safetensors files."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(f"{path.name} of {name} is damaged ({error}); download it again.") from error
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ModelError(
            f"{path.name} of {name} is not a table of weights. Use a checkpoint with safetensors files."
        )
    return content


def keep_tensors(store: BlockStore, source: str, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Put a part that is in memory (or mapped into it) into the store.

    Raises:
        ModelError: a dtype that safetensors does not know, or no room.
    """
    try:
        places = [Place(key, _NAMES[value.dtype], tuple(value.shape), 0, 0) for key, value in tensors.items()]
        layout = lay_out(places)
    except (KeyError, FormatError) as error:
        raise ModelError(
            f"{part} of {source} has weights of a kind that cannot be stored: {error}"
        ) from error
    partial = store.partial(source, part)
    store.reserve(partial, layout.size)
    with partial.open("r+b") as file:
        file.write(layout.front)
        for key, place in sorted(layout.places.items(), key=lambda item: (item[1].start, item[1].stop)):
            flat = tensors[key].detach().contiguous().reshape(-1)
            if place.nbytes:
                file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        file.seek(0)
        content = sha256_of(file)
    store.keep(partial, source, part, content, "hub")
