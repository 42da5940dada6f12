"""Which kernel was the fastest on this machine, remembered, so that each start need not measure it again.

A choice counts only where everything that it depends on is the same: the question itself (shape, dtype,
threads), the processor, this build of torch, the variables that steer its libraries, and our own version. A
choice says what is fast, never what is right: whoever makes use of one checks the products apart.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from swarmkit._version import __version__
from swarmkit.models.remembered import Remembered

_CHOICES = Remembered("kernels.json")
_NAMED = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
}
"""What tells processors apart in the words of Linux, on x86 and on ARM."""
_STEERING = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "THP_")
"""Beginnings of the names of variables by which libraries choose kernels or memory, or bind threads."""


def recall_choice(question: str) -> Any:
    """What was chosen here before, which the caller has to check: the file may hold anything. None: nothing.

    Args:
        question: kind, shape and dtype of the product, threads, and a number that is raised whenever what is
            compared, or how, is changed.
    """
    return _CHOICES.recall(_key(question))


def remember_choice(question: str, choice: Any) -> None:
    """Remember what was measured to be the fastest; `choice` is made of JSON types."""
    _CHOICES.remember(_key(question), choice)


def _key(question: str) -> str:
    steering = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_STEERING))
    about = "\n".join([processor(), build(), *steering])
    return f"{question}; swarmkit {__version__}; on {hashlib.sha256(about.encode()).hexdigest()[:16]}"


@functools.cache
def build() -> str:
    """Which torch this is, with the libraries in it."""
    return f"{torch.__version__}\n{torch.__config__.show()}"  # type: ignore[no-untyped-call]


@functools.cache
def processor() -> str:
    """Text that differs between processors which may differ in what is fastest."""
    capability = torch.backends.cpu.get_cpu_capability()
    return "\n".join([platform.machine(), platform.processor(), capability, *_from_linux()])


def _from_linux(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        first = path.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return []
    named = (line.partition(":") for line in first.splitlines())
    return [f"{name.strip()}: {value.strip()}" for name, _, value in named if name.strip() in _NAMED]
