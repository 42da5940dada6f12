"""The files of the package that a decode token passes through, in the order of their first calls."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from transformers import DynamicCache

import swarmkit
from swarmkit import LocalSwarm
from swarmkit.settings import ClientSettings

ROOT = Path(swarmkit.__file__).parents[1]
STEPS = 4
"""Steps that are followed: what one does after its answer may fall into the next one."""


class Recorder:
    """Notes each file of the package in which a function is called, while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.files: dict[str, None] = {}

    def __enter__(self) -> Self:
        """Follow this thread, and all that start from now on: one that runs cannot be followed any more."""
        self._before = sys.getprofile(), threading.getprofile()
        sys.setprofile(self._note)
        threading.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before[0])
        threading.setprofile(self._before[1])  # type: ignore[arg-type]

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.is_on and event == "call":
            self.files.setdefault(frame.f_code.co_filename)

    def of_package(self) -> list[str]:
        package = f"{Path(swarmkit.__file__).parent}/"
        return [str(Path(file).relative_to(ROOT)) for file in self.files if file.startswith(package)]


def files_of_a_token(checkpoint: Path) -> list[str]:
    """Have a swarm of this process compute tokens; no thread of another one may run any more."""
    with Recorder() as recorder, LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        settings = ClientSettings().replace(check_share=0.0)  # a check is beside the path, at random steps
        model = swarm.model(settings=settings)
        cache, token = DynamicCache(), torch.ones(1, 1, dtype=torch.int64)
        with torch.inference_mode():
            for step in range(8 + STEPS):
                recorder.is_on = step >= 8
                model(token, past_key_values=cache, use_cache=True)
        recorder.is_on = False
    return recorder.of_package()
