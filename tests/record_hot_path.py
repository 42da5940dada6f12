"""Prints the files of the package that a decode token passes through, in the order of their first calls.

A program of its own, since threads are only followed from their start. Its argument is a checkpoint.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import swarmkit

ROOT = Path(swarmkit.__file__).parents[1]
STEPS = 4
"""Steps that are followed: what one does after its answer may fall into the next one."""


class Recorder:
    """Notes each file of the package in which a function is called, while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.files: dict[str, None] = {}
        sys.setprofile(self._note)
        threading.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.is_on and event == "call":
            self.files.setdefault(frame.f_code.co_filename)

    def of_package(self) -> list[str]:
        package = f"{Path(swarmkit.__file__).parent}/"
        return [str(Path(file).relative_to(ROOT)) for file in self.files if file.startswith(package)]


def main(checkpoint: str) -> None:
    recorder = Recorder()

    import torch
    from transformers import DynamicCache

    from swarmkit.settings import ClientSettings

    with swarmkit.LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        settings = ClientSettings().replace(check_share=0.0)  # a check is beside the path, at random steps
        model = swarm.model(settings=settings)
        cache, token = DynamicCache(), torch.ones(1, 1, dtype=torch.int64)
        with torch.inference_mode():
            for step in range(8 + STEPS):
                recorder.is_on = step >= 8
                model(token, past_key_values=cache, use_cache=True)
        recorder.is_on = False
    print(*recorder.of_package(), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
