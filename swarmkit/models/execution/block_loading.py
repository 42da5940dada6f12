"""Some blocks of a checkpoint as transformers' own base model, truncated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from swarmkit.models.architecture.anatomy import anatomy_of, skeleton_of, stage_config
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.kernels.blocked_linear import use_blocked
from swarmkit.models.kernels.cut_linear import use_cuts
from swarmkit.models.loading import load_model
from swarmkit.models.quantization.precision import Precision


def load_blocks(
    checkpoint: Checkpoint,
    start: int,
    stop: int,
    precision: Precision,
    device: str | torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Load a base model whose only layers are blocks [start, stop), and which has nothing beside them.

    Args: progress: see `Stage.load`.

    Raises:
        ModelError: weights are missing, unknown or misshapen, or the architecture is not supported.
    """
    anatomy = anatomy_of(checkpoint.config)
    config = stage_config(checkpoint.config, start, stop)
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
        for key, tensor in checkpoint.read(names).items():
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
    use_blocked(base)
    use_cuts(base)
    if progress is not None:
        progress(stop - start, stop - start)
    return base
