"""Some blocks of a checkpoint as transformers' own base model, truncated.

Beside what stays, loading takes little memory. The layouts of weights are compared before any are read. The
files of one or two blocks are mapped at a time, and each tensor is copied (or converted, or quantised) when
transformers asks for it, so that neither a block's file nor its weights in another dtype are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swarmkit.models.architecture.anatomy import anatomy_of, block_skeletons, skeleton_of, stage_config
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.kernels.blocked_linear import compare_layouts, copy_for_a_while, use_blocked
from swarmkit.models.kernels.few_rows import use_ways
from swarmkit.models.loading import load_model
from swarmkit.models.quantization.precision import Precision


def load_blocks(
    checkpoint: Checkpoint,
    start: int,
    stop: int,
    precision: Precision,
    device: str | torch.device,
    progress: Callable[[int, int], None] | None = None,
    on_tensor: Callable[[], None] | None = None,
    will_compile: bool = False,
) -> PreTrainedModel:
    """Load a base model whose only layers are blocks [start, stop), and which has nothing beside them.

    Args: progress, on_tensor, will_compile: see `Stage.load`.

    Raises:
        ModelError: weights are missing, unknown or misshapen, or the architecture is not supported.
    """
    anatomy = anatomy_of(checkpoint.config)
    config = stage_config(checkpoint.config, start, stop)
    soon_replaced: set[torch.Size] = set()
    if torch.device(device).type == "cpu" and precision.stored is None and not precision.quantized:
        for kind in block_skeletons(checkpoint.config):
            soon_replaced |= compare_layouts(kind, precision.dtype, will_compile)
    # What lies outside the blocks is never read: it is taken away below.
    tensors = {
        key: torch.zeros(value.shape)
        for key, value in skeleton_of(anatomy.base_class, config).state_dict().items()
        if anatomy.block_of(key) is None
    }
    for done, block in enumerate(range(start, stop)):
        if progress is not None:
            progress(done, stop - start)
        names = checkpoint.block_keys(block, block + 1)
        # Within the stage the block is number `done`, not 0.
        one, here = f"{anatomy.layers}.0.", f"{anatomy.layers}.{done}."
        found = checkpoint.read(names)
        if precision.stored is None:
            found = _Block(checkpoint, found, precision, device, soon_replaced, on_tensor).tensors
        for key, tensor in found.items():
            tensors[here + names[key].removeprefix(one)] = tensor
    if precision.stored is not None:
        config.quantization_config = precision.stored.of_blocks(start, stop, anatomy)
        tensors = precision.stored.prepare(tensors, precision.dtype)
    base = load_model(
        anatomy.base_class,
        config,
        tensors,
        dtype=precision.dtype,
        device=device,
        quantization=precision.quantization_config(),
        name=f"{checkpoint.name}, blocks [{start}, {stop}),",
    )
    anatomy.neutralise(base)
    use_blocked(base, will_compile)
    use_ways(base)
    if progress is not None:
        progress(stop - start, stop - start)
    return base


class _Block:
    """A block's tensors, each of which is read when it is asked for, once.

    Its file is mapped from the first of them to the last.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        found: Mapping[str, Tensor],
        precision: Precision,
        device: str | torch.device,
        soon_replaced: Collection[torch.Size],
        on_tensor: Callable[[], None] | None,
    ) -> None:
        """Args: soon_replaced: shapes of weights of which others are made when all blocks are loaded."""
        self._on_tensor = on_tensor
        self._checkpoint = checkpoint
        self._soon_replaced = soon_replaced
        self._precision = precision
        self._on_cpu = torch.device(device).type == "cpu"
        self._left = set(found)
        self._mapped: dict[str, Tensor] = {}
        self._lock = threading.Lock()  # transformers asks from several threads
        self.tensors: dict[str, Any] = {key: _Unread(self, key, value.shape) for key, value in found.items()}

    def take(self, key: str) -> Tensor:
        """Read a tensor."""
        if self._on_tensor is not None:
            self._on_tensor()
        with self._lock:
            if key not in self._mapped:
                self._mapped = self._checkpoint.read({*self._left, key})
            tensor = self._mapped.pop(key)
            self._left.discard(key)
        # Any other tensor transformers converts, moves or quantises, which is a copy as well.
        stays = self._on_cpu and tensor.dtype == self._precision.dtype
        if not stays or (self._precision.quantized and tensor.ndim > 1):
            return tensor
        return copy_for_a_while(tensor) if tensor.shape in self._soon_replaced else tensor.clone()


class _Unread:
    """Stands for a tensor among the weights that transformers loads, which takes it as `self[...]`."""

    def __init__(self, block: _Block, key: str, shape: torch.Size) -> None:
        self.shape = shape
        self._block = block
        self._key = key

    def __getitem__(self, index: Any) -> Tensor:
        return self._block.take(self._key)[index]
