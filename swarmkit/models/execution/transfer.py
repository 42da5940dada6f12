"""Copies from the host's memory to a device that do not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the same tensor on `device`.

    A plain copy to an accelerator waits until the accelerator has done all its work. A copy from pinned
    memory is queued behind that work.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
