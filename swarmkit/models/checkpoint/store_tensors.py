"""Putting tensors that are in memory into the store."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_format import FormatError, TensorPlace, lay_out, sha256_of

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


def keep_tensors(store: BlockStore, source: str, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep a part whose tensors are in memory, or mapped into it, in the store.

    Raises:
        ModelError: a dtype that safetensors does not know, or no room.
    """
    try:
        places = [
            TensorPlace(key, _NAMES[value.dtype], tuple(value.shape), 0, 0) for key, value in tensors.items()
        ]
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
