"""What runs on a machine of `tests.namespaces`: `swarmkit serve`, or a client that is told what to do.

Run as `machine_program NAMESPACE CLOCK serve …` or `machine_program NAMESPACE CLOCK client MODEL ADDRESS…`.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import runpy
import struct
import sys
import time
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000


def enter(namespace: str) -> None:
    """Be in a network namespace from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open("rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")


def follow_clock(path: str) -> None:
    """Have the date be wrong by as many seconds as a file says at the moment."""
    from swarmkit.clock import SYSTEM_CLOCK

    with Path(path).open("rb") as file:
        shared = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    right = time.time

    def date() -> float:
        return right() + float(struct.unpack("d", shared[:8])[0])

    time.time = date
    SYSTEM_CLOCK.correct(0.0)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def be_client(model_name: str, *join: str) -> None:
    """Generate what each line of standard input asks for."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from swarmkit import SwarmModelForCausalLM

    torch.set_num_threads(1)
    model = SwarmModelForCausalLM.from_pretrained(model_name, initial_peers=join)
    session = model.session()

    class Paced(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, pause_s: float) -> None:
            self.pause_s = pause_s

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            say(token=int(ids[0, -1]))
            time.sleep(self.pause_s)
            return scores

    say(joined=model.extra_repr())
    for line in sys.stdin:
        request = json.loads(line)
        ids, known = torch.tensor([request["prompt"]]), len(model.events)
        try:
            tokens = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                session=session,
                do_sample=False,
                no_repeat_ngram_size=2,
                speculation="off",
                min_new_tokens=request["new_tokens"],
                max_new_tokens=request["new_tokens"],
                logits_processor=LogitsProcessorList([Paced(request["pause_s"])]),
            )
        except Exception as error:  # noqa: BLE001 - the test says which one it expects
            say(error=type(error).__name__, message=str(error))
        else:
            events = [type(event).__name__ for event in model.events[known:]]
            say(tokens=tokens[0].tolist(), events=events)


if __name__ == "__main__":
    namespace, clock, role, *rest = sys.argv[1:]
    enter(namespace)
    follow_clock(clock)
    if role == "client":
        be_client(*rest)
        os._exit(0)
    sys.argv = ["swarmkit", role, *rest]
    runpy.run_module("swarmkit.cli", run_name="__main__", alter_sys=True)
