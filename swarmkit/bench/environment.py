"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Date, machine and versions, as they stand in every result."""
    import torch
    import transformers

    from swarmkit import __version__

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "swarmkit " + " ".join(sys.argv[1:]),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "architecture": platform.machine(),
            **_accelerator(),
        },
        "versions": {
            "python": platform.python_version(),
            "swarmkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _accelerator() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"accelerator": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
