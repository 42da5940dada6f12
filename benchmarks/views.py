"""What do live views cost an answer?

    python benchmarks/views.py
    python benchmarks/views.py --rounds 30 --json          about four minutes on two cores

tiny-chat decodes over two server processes; the client is the kernel of a notebook. Answers take turns:
during every other one, a `PipelineView` and a `SessionTimeline` are shown and follow the model. This process
stands for the front end: it reads what the kernel sends. A browser would also draw, on its own machine.

Reported:

    ms, ms_viewed        for a token, as medians over answers of the mean
    cost                 median over rounds of (time with views / time without), minus 1; the goal is 0.02
    cost_low, cost_high  the quartiles of the same
    views_share          processor time of the views' threads, as a share of the time of the answers
    drawings_per_s       messages with a drawing, of both views together
    kilobytes_per_s      what the front end read
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_PROMPT_TOKENS = 16
_MARK = "RESULT "


def measure(rounds: int, tokens: int) -> dict[str, Any]:
    """Measure in the kernel in which this is called."""
    import torch
    from IPython.display import display

    from swarmkit import LocalSwarm
    from swarmkit.bench.measure import PATIENT, must_be_equal, random_prompt, timed_generate
    from swarmkit.notebook import PipelineView, SessionTimeline

    torch.set_num_threads(1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    used = 0.0
    with LocalSwarm("tiny-chat", num_stages=2, processes=True) as swarm:
        model = swarm.model(settings=PATIENT.replace(trace_steps=60))
        prompt = random_prompt(model.config.vocab_size, _PROMPT_TOKENS)
        expected = timed_generate(model, prompt, tokens).tokens
        for number in range(rounds):
            for viewed in (number % 2 == 0, number % 2 == 1):
                with ExitStack() as shown:
                    if viewed:
                        for kind in (PipelineView, SessionTimeline):
                            display(shown.enter_context(kind(model)))
                        time.sleep(0.3)  # what it takes to show a view is not what it takes to follow
                    before = _views_seconds()
                    made = timed_generate(model, prompt, tokens)
                    used += _views_seconds() - before
                must_be_equal(expected, made.tokens, "float32")
                seconds[viewed].append(made.stamps[-1] - made.stamps[1])
    ratios = [viewed / plain - 1 for viewed, plain in zip(seconds[True], seconds[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    plain, viewed = (statistics.median(seconds[key]) * 1e3 / (tokens - 1) for key in (False, True))
    return {
        "rounds": rounds,
        "tokens": tokens,
        "ms": round(plain, 4),
        "ms_viewed": round(viewed, 4),
        "cost": round(middle, 5),
        "cost_low": round(low, 5),
        "cost_high": round(high, 5),
        "views_share": round(used / sum(seconds[True]), 5),
        "seconds_viewed": sum(seconds[True]),
    }


def _views_seconds() -> float:
    """Processor time of the threads of views that run now."""
    import threading

    import psutil

    views = {thread.native_id for thread in threading.enumerate() if thread.name == "swarmkit-view"}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in views)


def in_kernel(rounds: int, tokens: int) -> dict[str, Any]:
    """Start a kernel, have it measure, and read all that it sends meanwhile."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import json, views\n"
        code += f"print({_MARK!r} + json.dumps(views.measure({rounds}, {tokens})))"
        asked = client.execute(code)
        result: dict[str, Any] = {}
        drawings, sent, busy = 0, 0, True
        while busy:
            message = client.get_iopub_msg(timeout=600)
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "comm_msg":
                drawings += "svg" in content["data"].get("state", {})
                sent += len(json.dumps(content))
            elif kind == "error":
                sys.exit("\n".join(content["traceback"]))
            elif kind == "stream":
                for line in content["text"].splitlines():
                    if line.startswith(_MARK):
                        result = json.loads(line.removeprefix(_MARK))
            elif kind == "status" and content["execution_state"] == "idle":
                busy = message["parent_header"].get("msg_id") != asked
        viewed = result.pop("seconds_viewed")
        result["drawings_per_s"] = round(drawings / viewed, 2)
        result["kilobytes_per_s"] = round(sent / viewed / 1e3, 1)
        return result
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def main() -> None:
    """Measure and print."""
    from swarmkit.bench.environment import environment

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = in_kernel(options.rounds, options.tokens)
    if options.json:
        command = f"python benchmarks/views.py --rounds {options.rounds} --tokens {options.tokens} --json"
        print(json.dumps({"benchmark": "views", **environment(), "command": command, **result}, indent=2))
    else:
        print("\n".join(f"{name:16} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
