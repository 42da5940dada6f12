"""The precisions in which a server keeps and computes its blocks.

`float32`, `bfloat16` and `float16` are dtypes of weights and computations. `int8` (LLM.int8, Dettmers et al.
2022) and `nf4` (QLoRA, Dettmers et al. 2023) keep the weights of linear layers in 8 and 4 bits and compute in
a 16- or 32-bit dtype; bitsandbytes does that, through transformers' `quantization_config`. A checkpoint whose
weights are stored quantised has no other precision than that (see `stored.py`): only the dtype can be chosen.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import resolve_dtype
from swarmkit.models.quantization.stored import StoredQuantisation

QUANTIZED = ("int8", "nf4")
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "nf4")
"""Precisions that a server can choose for a checkpoint with unquantised weights."""

# bitsandbytes' defaults: an 8-bit constant per 64 weights, themselves in blocks of 256 with a float32
# constant each (QLoRA, section 3, double quantisation): 4 + 8/64 + 32/(64 x 256) bits.
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
_INT8_ROW_BYTES = 4  # a float32 scale per row of the matrix


@dataclass(frozen=True)
class Precision:
    """How weights are kept, and the dtype of computations and caches.

    Attributes:
        name: the name that servers announce.
        stored: how the checkpoint's own weights are quantised; None if they are not.
    """

    name: str
    dtype: torch.dtype
    stored: StoredQuantisation | None = None

    @property
    def quantized(self) -> bool:
        """Whether weights are quantised while they are loaded."""
        return self.stored is None and self.name in QUANTIZED

    @property
    def keeps_stored(self) -> bool:
        """Whether weights take as many bytes in memory as in the checkpoint."""
        return self.stored is not None and not self.stored.is_expanded

    @property
    def allows_cuda_graphs(self) -> bool:
        """Whether forward passes can be recorded; kernels of int8 look at values while they run."""
        return self.name != "int8"

    @classmethod
    def parse(
        cls, name: str | torch.dtype | None, config: PreTrainedConfig, device: str | torch.device = "cpu"
    ) -> Precision:
        """Read a precision as users write it; "auto" is float32 on a CPU and the checkpoint's own elsewhere.

        Raises:
            ModelError: there is no such precision, or not for this checkpoint.
        """
        stored = StoredQuantisation.of(config)
        if stored is not None and (
            not isinstance(name, str) or name not in QUANTIZED or name == stored.label
        ):
            wanted = "auto" if name == stored.label else name
            return cls(stored.label, resolve_dtype(wanted, config, device), stored)
        if stored is not None:
            raise ModelError(
                f"These weights are stored quantised ({stored.method}) and cannot be made {name}; choose "
                "auto, float32, bfloat16 or float16, in which is computed."
            )
        if isinstance(name, str) and name in QUANTIZED:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
            return cls(name, dtype)
        try:
            dtype = resolve_dtype(name, config, device)
            return cls(str(dtype).removeprefix("torch."), dtype)
        except ModelError:
            raise ModelError(f"{name!r} is no precision; choose auto, {', '.join(PRECISIONS)}") from None

    def ensure_available(self, checkpoint: str, device: str | torch.device) -> None:
        """Check that this machine has what loading takes, before weights are fetched.

        Raises:
            ModelError: it has not. The message calls the model `checkpoint`, and says what to do.
        """
        if self.stored is not None:
            self.stored.ensure_loadable(checkpoint, device)
        elif self.quantized and importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(f"{self.name} needs bitsandbytes; install it with: pip install bitsandbytes")
        if self.name == "int8":
            # It warns at every step of every layer that float32 is cast, which is what was asked for.
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def quantization_config(self) -> Any | None:
        """Return how transformers' loader is to quantise; None if it is not to."""
        if not self.quantized:
            return None
        if self.name == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )

    def weight_bytes(self, module: nn.Module) -> int:
        """Return the bytes of a module's weights in this precision; the module may be on the meta device."""
        matrices = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
        total = 0.0
        for parameter in module.parameters():
            numel = parameter.numel()
            if not self.quantized or id(parameter) not in matrices:
                total += numel * self.dtype.itemsize
            elif self.name == "int8":
                total += numel + parameter.shape[0] * _INT8_ROW_BYTES
            else:
                total += numel * _NF4_BYTES
        return int(total) + 1


def choices(config: PreTrainedConfig, device: str | torch.device = "cpu") -> list[Precision]:
    """List the precisions that a server on this device can choose for a checkpoint."""
    names = ("auto",) if StoredQuantisation.of(config) else PRECISIONS
    return [Precision.parse(name, config, device) for name in names]
