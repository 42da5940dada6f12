"""LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.

They are read without PEFT, so that a server needs no more packages to host one. Settings that this version
does not compute in the same way as PEFT are refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swarmkit.errors import AdapterError
from swarmkit.models.adapters.adapter import Adapter, AdapterSpec, Fittings, Lora
from swarmkit.models.adapters.patterns import alpha_of, check_patterns
from swarmkit.models.architecture.anatomy import Anatomy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1024 * 1024

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<kind>[AB])\.weight")
_MUST_BE_OFF = {
    "use_dora": "DoRA",
    "lora_bias": "a bias beside B",
    "target_parameters": "adapters of bare parameters (experts that are kept in one tensor)",
    "modules_to_save": "modules trained as a whole",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Settings of PEFT's `LoraConfig` that change what is computed, and how error messages describe them."""


def check_config(config: Mapping[str, Any]) -> None:
    """Raise AdapterError unless a `LoraConfig` (as a dict) describes plain LoRA."""
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise AdapterError(f"a {kind} adapter cannot work inside remote blocks; this version takes LORA")
    for name, meaning in _MUST_BE_OFF.items():
        if config.get(name):
            raise AdapterError(f"{name} is set: {meaning} cannot work inside remote blocks; leave it out")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias={config['bias']!r} trains weights of remote blocks; use bias='none'")
    check_patterns(config)


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter: its config, and the names of its tensors.

    Attributes:
        digest: a hash of both files, 64 hex digits; equal ones mean equal adapters.
        places: for each block and module, the names of A and B in the file.
    """

    folder: Path
    config: Mapping[str, Any]
    digest: str
    places: Mapping[tuple[int, str], tuple[str, str]]

    @classmethod
    def open(cls, folder: Path, anatomy: Anatomy) -> SavedAdapter:
        """Read the config and the names of the tensors in a folder.

        Raises:
            AdapterError: files are missing or malformed, or it is of a kind that is not supported.
        """
        config = _read_config(folder)
        check_config(config)
        path = folder / WEIGHTS
        parts: dict[tuple[int, str], dict[str, str]] = {}
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                found = _KEY.fullmatch(name)
                place = anatomy.block_of(found["path"]) if found else None
                if found is None or place is None:
                    raise AdapterError(
                        f"{path} has {name!r}, which is not LoRA of a linear layer in a block; what lies "
                        "outside the blocks belongs to the client: load it there, with swarmkit.load_adapter"
                    )
                parts.setdefault(place, {})[found["kind"]] = name
        for (block, module), names in parts.items():
            if len(names) != 2:
                raise AdapterError(f"{path} lacks one of the two tensors of {module} in block {block}")
        places = {place: (names["A"], names["B"]) for place, names in sorted(parts.items())}
        if not places:
            raise AdapterError(f"{path} has no tensors")
        return cls(folder, config, _digest(folder), places)

    def read(self, fittings: Fittings, start: int, stop: int, max_rank: int | None = None) -> Adapter:
        """Read the part for blocks [start, stop), which may be empty, and check that it fits them.

        Raises:
            AdapterError: it does not fit, or its values are not numbers.
        """
        lora: list[Lora] = []
        values: list[Tensor] = []
        with _opened(self.folder / WEIGHTS) as file:
            for (block, module), names in self.places.items():
                if not start <= block < stop:
                    continue
                inside, outside = fittings.size(block, module)
                shapes = [tuple(file.get_slice(name).get_shape()) for name in names]
                rank = shapes[0][0] if len(shapes[0]) == 2 else 0
                if not rank or shapes != [(rank, inside), (outside, rank)]:
                    raise AdapterError(
                        f"the adapter is for another model: {module} of block {block} has "
                        f"{inside} features in and {outside} out, A and B are {shapes[0]} and {shapes[1]}"
                    )
                lora.append(Lora(block, module, rank, scaling_of(self.config, self._path(names[0]), rank)))
                values += [file.get_tensor(name).flatten() for name in names]
        spec = AdapterSpec(start, stop, tuple(lora))
        fittings.check(spec, max_rank)
        flat = torch.cat(values) if values else torch.empty(0)
        if not bool(torch.isfinite(flat).all()):
            raise AdapterError(f"{self.folder} contains NaN or infinity")
        if not flat.is_floating_point() or flat.dtype.itemsize > 4:
            flat = flat.to(torch.float32)
        return Adapter(spec, flat, fittings)

    def _path(self, name: str) -> str:
        found = _KEY.fullmatch(name)
        assert found is not None
        return found["path"]


def scaling_of(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return s of the linear layer at `path`: alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023)."""
    return alpha_of(config, path) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def fetch_adapter(name: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the folder of a saved adapter: a local one, or a Hub repository, of which two files are fetched.

    Args:
        hub: `revision` and `token`.

    Raises:
        AdapterError: there is none.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(str(name), CONFIG, **hub)
        return Path(hf_hub_download(str(name), WEIGHTS, **hub)).parent
    except Exception as error:
        raise AdapterError(
            f"{name} is neither a folder nor an adapter on the Hub with {CONFIG} and {WEIGHTS}: {error}"
        ) from error


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is not an adapter's config")
    return config


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error


def _digest(folder: Path) -> str:
    digest = hashlib.sha256(b"swarmkit saved adapter 1\n" + (folder / CONFIG).read_bytes() + b"\n")
    with (folder / WEIGHTS).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
