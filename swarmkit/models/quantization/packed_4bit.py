"""4-bit layers on CPUs for which bitsandbytes packs weights in an order of its own.

On processors with AVX512-BF16, bitsandbytes packs the weights of a layer with its first step without
gradients, and computes with a kernel that has no derivative from then on: what comes before such a layer
would get no gradient through it, and no error. Here the layer is run over its unpacked weights where a
gradient is wanted. They are unpacked again on the way back, so that the graph holds no weights. Layers of
sizes that bitsandbytes cannot pack, and on which it would fail, stay as they are.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_PACKED_ROWS = 32
"""bitsandbytes packs so many outputs together."""


def prepare_4bit(model: nn.Module) -> None:
    """Let all 4-bit layers of a model compute, and have gradients, whether or not a CPU packs them."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = _layer_class()
            weight: Any = module.weight
            if module.out_features % _PACKED_ROWS or module.in_features % weight.quant_state.blocksize:
                module.support_avx512bf16_for_cpu = False


@cache
def _layer_class() -> type[Any]:
    from bitsandbytes.nn import Linear4bit

    class GradientLinear4bit(Linear4bit):  # type: ignore[misc]
        """bitsandbytes' layer, with gradients where its weights are packed for a CPU."""

        def forward(self, x: Tensor) -> Tensor:
            weight: Any = self.weight
            is_packed = getattr(weight.quant_state, "packing_format_for_cpu", False)
            if is_packed and torch.is_grad_enabled() and x.requires_grad:
                output: Tensor = _Unpacked.apply(x, weight)  # type: ignore[no-untyped-call]
                return output if self.bias is None else output + self.bias.to(output.dtype)
            output = super().forward(x)
            return output

    return GradientLinear4bit


class _Unpacked(torch.autograd.Function):
    """y = W x, where W is unpacked each time that it is needed."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return functional.linear(given, _unpacked(weight, given.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ _unpacked(ctx.weight, gradient.dtype), None


def _unpacked(weight: Any, dtype: torch.dtype) -> Tensor:
    """The weights [out, in] that the kernel for packed ones multiplies with."""
    from bitsandbytes import functional as bnb

    state = copy.copy(weight.quant_state)
    state.original_nested = False  # else its constants would be rounded once more
    data, state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    return bnb.dequantize_4bit(data.reshape(-1, 1), state).to(dtype)
