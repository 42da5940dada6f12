"""How fast would this machine run the whole model alone, if it can? Measured with one block."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.files import LocalFiles
from swarmkit.models.execution.stage import Stage
from swarmkit.models.plan import device_memory_bytes, plan_checkpoint
from swarmkit.models.quantization.precision import Precision

_STEPS = 8
_SESSION_TOKENS = 2048


def local_token_s(
    checkpoint: Checkpoint, device: str = "cpu", now: Callable[[], float] = SYSTEM_CLOCK.now
) -> float | None:
    """Seconds of a token through all blocks on this machine; None if they do not fit, or are not here.

    One block is loaded and timed, and counts as often as there are blocks. Nothing is fetched for it.

    Raises:
        ModelError: the block's weights are damaged.
    """
    if not isinstance(checkpoint.files, LocalFiles):
        return None
    precision = Precision.parse("auto", checkpoint.config, device)
    memory = device_memory_bytes(device)
    plan = plan_checkpoint(checkpoint, memory, precision, cache_tokens=_SESSION_TOKENS, device=device)
    if plan.blocks_that_fit < checkpoint.num_blocks:
        return None
    stage = Stage.load(checkpoint, 0, 1, device=device)
    cache = stage.new_cache(0, 1)
    hidden = torch.randn(1, 1, stage.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(stage.device, stage.dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(_STEPS):
            began_at = now()
            stage.forward(hidden, cache).to("cpu")
            seconds.append(now() - began_at)
    return statistics.median(seconds) * checkpoint.num_blocks
