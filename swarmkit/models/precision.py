"""In what precision a server keeps and computes its blocks.

`float32`, `bfloat16` and `float16` are what they say. `int8` (LLM.int8, Dettmers et al. 2022) and `nf4`
(QLoRA, Dettmers et al. 2023) keep the weights of linear layers in 8 and 4 bits and compute in a 16- or 32-bit
dtype; they are bitsandbytes' work, through transformers' `quantization_config`.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from swarmkit.errors import ModelError
from swarmkit.models.anatomy import resolve_dtype

PrecisionName = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
QUANTIZED: tuple[PrecisionName, ...] = ("int8", "nf4")
PRECISIONS: tuple[PrecisionName, ...] = ("float32", "bfloat16", "float16", "int8", "nf4")

# bitsandbytes' defaults: an 8-bit constant per 64 weights, themselves in blocks of 256 with a float32
# constant each (QLoRA, section 3, double quantisation): 4 + 8/64 + 32/(64 x 256) bits.
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
_INT8_ROW_BYTES = 4  # a float32 scale per row of the matrix


@dataclass(frozen=True)
class Precision:
    """How weights are kept (`name`) and in what dtype is computed, and the cache kept."""

    name: PrecisionName
    dtype: torch.dtype

    @property
    def quantized(self) -> bool:
        return self.name in QUANTIZED

    @classmethod
    def parse(
        cls, name: str | torch.dtype | None, config: PreTrainedConfig, device: str | torch.device = "cpu"
    ) -> Precision:
        """Read a precision as people write it; "auto" is float32 on a CPU and the checkpoint's own elsewhere.

        Raises:
            ModelError: no such precision.
        """
        if isinstance(name, str) and name in QUANTIZED:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
            return cls(name, dtype)  # type: ignore[arg-type]
        try:
            dtype = resolve_dtype(name, config, device)
            return cls(str(dtype).removeprefix("torch."), dtype)  # type: ignore[arg-type]
        except ModelError:
            raise ModelError(f"{name!r} is no precision; choose auto, {', '.join(PRECISIONS)}") from None

    def quantization_config(self) -> Any | None:
        """What transformers' loader needs to know, or None for a plain dtype.

        Raises:
            ModelError: bitsandbytes is not installed.
        """
        if not self.quantized:
            return None
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                f"{self.name} needs bitsandbytes; install it with: pip install 'swarmkit[quantization]'"
            )
        if self.name == "int8":
            # It says at every step of every layer that float32 is cast: that is what was asked for.
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )

    def weight_bytes(self, module: nn.Module) -> int:
        """Bytes of a module's weights in this precision; the module may be on the meta device."""
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
