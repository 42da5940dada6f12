"""From the host's memory to a device, without waiting for what the device does."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor there.

    A plain copy to an accelerator waits until all work that it was given is done. One from memory that stays
    where it is (pinned) takes its turn behind that work.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
