"""Whether a device can be used here, before anything is loaded onto it."""

from __future__ import annotations

import torch

from swarmkit.errors import UsageError


def ensure_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is not a device; use cpu, cuda, cuda:1 (the second GPU) or mps") from None
    if device.type in ("cpu", "meta"):
        return device
    backend = getattr(torch, device.type, None)
    usable = backend is not None and backend.is_available()
    count = backend.device_count() if usable and backend is not None else 0
    if not usable:
        hint = ""
        if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
            hint = " (this build of torch has no support for GPUs; install one from https://pytorch.org)"
        raise UsageError(f"torch finds no {device.type} device on this machine{hint}; use cpu")
    if device.index is not None and device.index >= count:
        raise UsageError(f"there is no {device}: torch finds {count} {device.type} device(s), from 0 on")
    return device
