"""Checkpoints whose weights are stored quantised: GPTQ, AWQ, FP8, MXFP4, compressed-tensors, bitsandbytes, …

transformers' quantizers do the work: the config's `quantization_config` names one, and a stage's config has
the same. This file adds what a cut needs besides: the name of such a precision, the packages that it takes,
lists of modules that count blocks from the stage's first one, and the methods that are undone on loading. The
last are those whose kernels need a GPU (or are fetched when they first run): their weights are expanded to
the dtype of computations, so that they run everywhere.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import Anatomy
from swarmkit.models.architecture.wrapper import plain_name
from swarmkit.models.foreign_errors import reason_of

_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("optimum", "gptqmodel"),
}
"""Packages that transformers imports for a method, by their names on PyPI; its own errors name one or none.
"""

_EXPANDED = frozenset({"compressed-tensors", "fp8", "mxfp4", "mxfp8"})
_LABELS = {"compressed-tensors": "compressed"}


@dataclass(frozen=True)
class StoredQuantisation:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: the method's name in transformers.
        content: the config's `quantization_config`.
    """

    method: str
    content: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> StoredQuantisation | None:
        """Read it from a model's config; None if its weights are stored as plain numbers."""
        content = getattr(config, "quantization_config", None)
        if not content:
            return None
        content = dict(content) if isinstance(content, Mapping) else content.to_dict()
        bits = content.get("load_in_4bit") or content.get("load_in_8bit")  # as older configs have it
        return cls("bitsandbytes" if bits else str(content.get("quant_method", "unknown")), content)

    @property
    def label(self) -> str:
        """The name that servers announce; for methods that a server can choose too, the name of that
        precision.
        """
        if self.method != "bitsandbytes":
            return _LABELS.get(self.method, self.method)[:16]
        return (
            str(self.content.get("bnb_4bit_quant_type", "fp4"))
            if self.content.get("load_in_4bit")
            else "int8"
        )

    @property
    def is_expanded(self) -> bool:
        """Whether the weights are plain numbers once they are loaded."""
        return self.method in _EXPANDED

    def ensure_loadable(self, name: str, device: str | torch.device) -> None:
        """Check that this machine can load such weights; no weights are needed for that.

        Raises:
            ModelError: it lacks packages or a device; the message says what to do.
        """
        missing = [package for package in _PACKAGES.get(self.method, ()) if not is_installed(package)]
        if missing:
            raise ModelError(
                f"The weights of {name} are stored quantised ({self.method}), which takes packages that are "
                f"not installed here: pip install {' '.join(missing)}. Or give a checkpoint with unquantised "
                "weights, and choose --dtype int8 or nf4."
            )
        try:
            quantizer = AutoHfQuantizer.from_config(self.loading(), pre_quantized=True)
            quantizer.validate_environment(device_map={"": torch.device(device)}, weights_only=True)
        except Exception as error:
            raise ModelError(
                f"The weights of {name} are stored quantised ({self.method}), which transformers cannot load "
                f"here: {reason_of(error)} If no package and no other --device help, give a checkpoint with "
                "unquantised weights, and choose --dtype int8 or nf4."
            ) from error

    def loading(self) -> dict[str, Any]:
        """Return the `quantization_config` for transformers' loader."""
        return {**self.content, **({"dequantize": True} if self.is_expanded else {})}

    def of_blocks(self, start: int, stop: int, anatomy: Anatomy) -> dict[str, Any]:
        """Return the `quantization_config` of a base model that has only these blocks, renumbered from 0.

        Raises:
            ModelError: it names single blocks in a way that cannot be renumbered.
        """
        content: dict[str, Any] = _renumbered(self.loading(), start, stop, anatomy)
        if self.method == "bitsandbytes":
            # What lies outside the blocks has no weights here that could have been quantised.
            content["llm_int8_skip_modules"] = [
                *(content.get("llm_int8_skip_modules") or ()),
                *anatomy.outside,
            ]
        return content

    def prepare(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Change tensors of a checkpoint so that transformers reads them correctly.

        In FP8 a scale holds for a tile of `weight_block_size`, and for less at the right and lower edges of a
        matrix that is not made of whole tiles (DeepSeek-V3 has one in every block). transformers divides such
        a matrix evenly among its scales; with a scale per row and column there is nothing to divide. Tensors
        that are not quantised it leaves in the dtype that they are stored in, so these are converted here.
        """
        ready = dict(tensors)
        if self.method != "fp8":
            return ready
        tile = self.content.get("weight_block_size") or ()
        for name, tensor in tensors.items():
            scales = tensors.get(f"{name}_scale_inv")
            if scales is None and name.endswith(".weight") and tensor.is_floating_point():
                ready[name] = tensor.to(dtype)
            if scales is None or scales.ndim != 2:
                continue
            for axis, side in enumerate(tile):
                if tensor.shape[axis] != scales.shape[axis] * side:
                    scales = scales.repeat_interleave(side, axis).narrow(axis, 0, tensor.shape[axis])
            ready[f"{name}_scale_inv"] = scales
        return ready


def is_installed(package: str) -> bool:
    """Whether a package can be imported, by its name on PyPI."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


class _Elsewhere(Exception):
    """The name of a module in a block that is not in the stage."""


def _renumbered(value: Any, start: int, stop: int, anatomy: Anatomy) -> Any:
    """Rename all names of modules in `value` to the stage's, and leave out those of other blocks."""
    if isinstance(value, Mapping):
        items: dict[Any, Any] = {}
        for key, inner in value.items():
            try:
                items[_rename(key, start, stop, anatomy)] = _renumbered(inner, start, stop, anatomy)
            except _Elsewhere:  # noqa: PERF203
                continue
        return items
    if isinstance(value, list | tuple):
        kept = []
        for inner in value:
            try:
                kept.append(_renumbered(inner, start, stop, anatomy))
            except _Elsewhere:  # noqa: PERF203
                continue
        return kept
    return _rename(value, start, stop, anatomy)


def _rename(name: Any, start: int, stop: int, anatomy: Anatomy) -> Any:
    if not isinstance(name, str):
        return name
    # Of a pattern, the beginning is like that of a name, but for the dot.
    prefix = rf"^(re:)?(\^?){re.escape(anatomy.prefix)}\\?\.(?=.)"
    bare = re.sub(prefix, lambda found: (found[1] or "") + found[2], plain_name(name))
    layers = re.escape(anatomy.layers)
    if place := re.fullmatch(rf"{layers}\.(\d+)(\..+)?", bare):
        if not start <= int(place[1]) < stop:
            raise _Elsewhere
        return f"{anatomy.layers}.{int(place[1]) - start}{place[2] or ''}"
    if re.search(rf"{layers}[\\.\[(]+\d", bare):
        raise ModelError(
            f"How these weights are quantised depends on blocks that a pattern names by number ({name}), "
            "which this version cannot renumber for a part of the model. Give a checkpoint with unquantised "
            "weights."
        )
    return bare
