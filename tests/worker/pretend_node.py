"""A node process without a model: it speaks with the worker as the real one does, and computes nothing.

The name of the model that it is to serve says how it behaves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

REPORT = {"type": "report", "sessions": 1, "sessions_begun": 1, "gpu_bytes": 0}
PERIOD_S = 0.1


def say(**word: Any) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


def report(count: int, behaviour: str) -> None:
    """Every period 10 tokens, 1,000 bytes up and 500 down; much more where it is greedy."""
    factor = 10_000 if behaviour == "greedy-for-traffic" else 1
    amounts = {"tokens": 10 * count, "sent_bytes": 1000 * factor * count, "received_bytes": 500 * count}
    say(**{**REPORT, "sessions": 0 if behaviour == "unused" else 1}, **amounts)


def work(behaviour: str) -> None:
    owner = {"kind": "server", "peer_id": "pretended", "number": 0}
    event = {"event": "serving_started", "start": 0, "stop": 4, "owner": owner, "addresses": ["/pretended"]}
    say(type="event", event={**event, "message": "serving blocks 0:4"})
    held = bytearray(600 * 2**20) if behaviour == "greedy-for-memory" else b""
    for place in range(0, len(held), 4096):
        held[place] = 1  # type: ignore[index]
    for count in range(1, 100_000):
        report(count, behaviour)
        time.sleep(PERIOD_S)


def main() -> None:
    order = json.loads(sys.stdin.readline())
    behaviour = order["serve"]["model"]
    if behaviour == "failing":
        sys.exit("the pretended model cannot be had")
    if behaviour == "too-large":
        say(type="failed", why="1.0 GiB is too little memory to serve too-large; allow at least 1.5 GiB")
        sys.exit("Traceback: what no person understands")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=work, args=(behaviour,), daemon=True).start()
    for line in sys.stdin:
        word = json.loads(line)
        if word["type"] == "leave" and behaviour != "stubborn":
            time.sleep(min(word["drain_s"], 0.1))
            break
        sys.stderr.write(f"told: {json.dumps(word)}\n")
        sys.stderr.flush()
    os._exit(0)


main()
