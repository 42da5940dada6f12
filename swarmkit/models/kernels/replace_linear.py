"""Replacing a model's linear layers by others that compute the same products faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

L = TypeVar("L", bound=nn.Linear)

SMALLEST = 2**18
"""Layers with fewer weights stay as they are: their products take next to no time."""


def replace_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Linear | None]) -> int:
    """Replace each plain linear layer by `make(layer)`, unless that is None; returns how many.

    A layer that was replaced is let go before the next one is made, so that there is memory for one copy.
    """
    replaced = 0
    for module in [module for module in model.modules() if type(module) is not nn.Linear]:
        for name in [name for name, _ in module.named_children()]:
            child = module.get_submodule(name)
            if type(child) is nn.Linear and (new := make(child)) is not None:
                setattr(module, name, new)
                replaced += 1
    return replaced


def with_weights_of(layer: nn.Linear, kind: type[L]) -> L:
    """Make a linear layer of another class that shares the weights of `layer`."""
    same = kind(layer.in_features, layer.out_features, bias=False, device="meta")
    same.weight, same.bias = layer.weight, layer.bias
    return same.train(layer.training)


def can_be_replaced(layer: nn.Linear) -> bool:
    """Whether a layer is large, frozen and on a CPU."""
    weight = layer.weight
    return weight.device.type == "cpu" and not weight.requires_grad and weight.numel() >= SMALLEST


def noise_weight(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight [out, in] to try products with, always the same; its products with noise are about 1."""
    noise = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    return (noise / inputs**0.5).to(dtype)


def noise_rows(count: int, weight: Tensor) -> Tensor:
    """Rows [count, in] to multiply by a weight, always the same."""
    return torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(count)).to(
        weight.dtype
    )


def gives_products(
    product: Callable[[Tensor], Tensor], weight: Tensor, numbers: Sequence[int], bound: float
) -> bool:
    """Whether `product` multiplies by a weight of noise, but for the order of additions.

    Args:
        numbers: of rows that are tried.
        bound: the largest difference that the order may make, where values are about 1.
    """
    for count in numbers:
        given = noise_rows(count, weight)
        if not torch.allclose(functional.linear(given, weight), product(given), rtol=0, atol=bound):
            return False
    return True


def median_seconds(works: Sequence[Callable[[], object]], trials: int) -> list[float]:
    """Median of the seconds that `trials` calls of each work take.

    They are called by turns, so that whatever else the machine does meanwhile disturbs all alike.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(trials):
        for taken, work in zip(times, works, strict=True):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]
