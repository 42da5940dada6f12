"""A model's output layer alone, in float32: what a server needs to compute logits for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import anatomy_of, skeleton_of, slice_config
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.kernels.few_rows import fastest_ways, multiply_rows


@dataclass(frozen=True)
class TopLogits:
    """The largest logits of some rows, all in float32.

    Attributes:
        values: `[rows, top]`, the largest first; `[rows, vocabulary]` where all were asked for.
        tokens: `[rows, top]`, int64; None where all were asked for.
        log_sum_exp: `[rows]`, over the whole vocabulary, of the logits divided by the temperature.
    """

    values: Tensor
    tokens: Tensor | None
    log_sum_exp: Tensor


def top_logits(logits: Tensor, top: int, temperature: float) -> TopLogits:
    """Pick the `top` largest of each row of `logits` `[rows, vocabulary]`; all of them where `top` is 0."""
    total = torch.logsumexp(logits / temperature, dim=-1)
    if not top:
        return TopLogits(logits, None, total)
    found = torch.topk(logits, min(top, logits.shape[1]), dim=-1)
    return TopLogits(found.values, found.indices, total)


class OutputLayer:
    """The linear layer that turns the output of a model's final norm into logits.

    Its weights are float32, whatever the blocks are computed in: logits that are rounded to bfloat16 have
    ties among the likeliest tokens.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Args: weight: `[vocabulary, hidden]`. bias: `[vocabulary]`."""
        self.weight = weight
        self.bias = bias

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: str | torch.device = "cpu") -> OutputLayer:
        """Read the output layer, and nothing else, from a checkpoint.

        Raises:
            ModelError: the model's output layer is none that can be served alone.
        """
        keys = _keys(checkpoint)
        tensors = checkpoint.read({key: name for key, name in keys.values()})
        named = {
            part: tensors[key].to(device=device, dtype=torch.float32).contiguous()
            for part, (key, _) in keys.items()
        }
        return cls(named["weight"], named.get("bias"))

    @property
    def vocabulary(self) -> int:
        """Number of logits of a row."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of its input."""
        return self.weight.shape[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute the logits `[rows, vocabulary]` of `hidden` `[rows, hidden]`."""
        weight = self.weight
        with torch.inference_mode():
            if weight.device.type != "cpu":
                return functional.linear(hidden.to(weight.device), weight, self.bias)
            way_of = fastest_ways(*weight.shape, weight.dtype, torch.get_num_threads())
            return multiply_rows(hidden, weight, self.bias, way_of)


def output_layer_bytes(checkpoint: Checkpoint) -> int:
    """Return the memory that `OutputLayer.load` takes, in bytes.

    Raises:
        ModelError: the model's output layer is none that can be served alone.
    """
    layer = _layer(checkpoint)[1]
    return (layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())) * torch.float32.itemsize


def _layer(checkpoint: Checkpoint) -> tuple[nn.Module, nn.Linear]:
    """The causal model without memory for weights, and its output layer."""
    anatomy = anatomy_of(checkpoint.config)
    model: Any = skeleton_of(anatomy.causal_class, slice_config(checkpoint.config, 0, 1))
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise ModelError(f"the output layer of {checkpoint.name} is no linear layer, which cannot be served")
    return model, layer


def _keys(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """The checkpoint's tensors for `weight` and `bias`, each as its key and its name in the causal model."""
    model, layer = _layer(checkpoint)
    path = next(path for path, part in model.named_modules() if part is layer)
    by_name = {name: key for key, name in checkpoint.head_keys().items()}
    found = {}
    for part in ("weight", "bias"):
        name = f"{path}.{part}"
        if name in by_name:
            found[part] = (by_name[name], name)
    if "weight" not in found:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        tied = next(path for path, part in model.named_modules() if part is embeddings) + ".weight"
        if tied not in by_name:
            raise ModelError(f"{checkpoint.name} has no weights for its output layer")
        found["weight"] = (by_name[tied], tied)
    return found
