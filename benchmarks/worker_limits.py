"""Is each limit of the worker kept, and how soon does it get out of the way?

    python -m benchmarks.worker_limits                        prints the table
    python -m benchmarks.worker_limits --write                also writes the results and docs/limits.md
    python -m benchmarks.worker_limits --only disk --write    writes some rows anew

It takes about twelve minutes. A worker serves tiny-chat on this machine, a client keeps it as busy as it can,
and one limit after the other is set. What is measured is the whole tree of the node's processes, from
outside.

The worker is the one of `swarmkit worker run`, and senses this machine. What cannot be had on a test machine
(a battery, a metered line, another program on a GPU) it reads from a file in the place of its own senses, and
what a tray would tell it is told by this program: these rows say "told".
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import worker_amounts as amounts
from benchmarks import worker_rules as rules
from benchmarks.worker_bench import MODELS, ROOT, Bench, DidNotComeError, Measured
from swarmkit.bench.environment import environment
from swarmkit.worker.sensing.nvidia import gpus
from swarmkit.worker.sensing.probes import UnknownError
from tests.models.hub import local_hub

RESULTS = ROOT / "benchmarks" / "results" / "worker-limits.json"
PAGE = ROOT / "docs" / "limits.md"
COMMAND = "python -m benchmarks.worker_limits --write"
TABLE = f"<!-- the table below is written by `{COMMAND}` -->\n"

ROWS: dict[str, Callable[[Bench], Measured]] = {
    "temperature": amounts.temperature,
    "cores": amounts.cores,
    "compute_share": amounts.compute_share,
    "upload": amounts.upload,
    "download": amounts.download,
    "memory": amounts.memory,
    "disk": amounts.disk,
    "quota": amounts.quota,
    "pause": functools.partial(amounts.pause, haste="prompt"),
    "pause_now": functools.partial(amounts.pause, haste="now"),
    "battery": rules.battery,
    "metered": rules.metered,
    "gpu_program": rules.gpu_program,
    "busy_gpu": rules.busy_gpu,
    "too_hot": rules.too_hot,
    "program": rules.program,
    "busy_cpu": rules.busy_cpu,
    "schedule": rules.schedule,
    "disk_free": rules.disk_free,
    "in_use": rules.in_use,
    "full_screen": rules.full_screen,
    "film": rules.film,
    "remote_session": rules.remote_session,
    "absence": rules.absence,
    "in_use_or_away": rules.in_use_or_away,
    "no_tray": rules.no_tray,
}


def measured(names: Iterable[str]) -> dict[str, Measured]:
    """Measure some rows, and print each. One for which something does not come about is left out."""
    rows = {}
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        repos: dict[str, Path | None] = dict(zip(MODELS, bench.models, strict=True))
        with local_hub(repos) as hub, bench.running(hub):
            for name in names:
                row = _measured(bench, name)
                if row is not None:
                    rows[name] = row
    return rows


def _measured(bench: Bench, name: str) -> Measured | None:
    try:
        bench.as_usual()
        row = ROWS[name](bench)
    except DidNotComeError as error:
        print(f"{name}: it did not come about that {error}", file=sys.stderr, flush=True)
        return None
    print(_line(asdict(row)), flush=True)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, and what this machine cannot measure."""
    lines = ["| limit | set to | measured | without it | kept |", "| --- | --- | --- | --- | --- |"]
    lines += map(_line, rows)
    lines.append(f"| a GPU's memory and watts | | not measured: {_why_no_gpu()} | | |")
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    kept = "yes" if row["kept"] else "**no**"
    return f"| {row['limit']} | {row['set_to']} | {row['measured']} | {row['without']} | {kept} |"


def _why_no_gpu() -> str:
    try:
        return "this program serves on the processor only" if gpus() else "this machine has no GPU"
    except UnknownError:
        return "this machine has no GPU"


def write(rows: dict[str, Measured]) -> None:
    """Replace these rows of the results, and write the page's table from all that are there."""
    told = environment()
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    made = {name: {"date": told["date"], **asdict(row)} for name, row in rows.items()}
    every = {name: made.get(name, kept.get(name)) for name in ROWS if name in made or name in kept}
    result = {**told, "command": COMMAND, "rows": every}
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    dates = " and ".join(sorted({row["date"][:10] for row in every.values()}))
    head, mark, _ = PAGE.read_text().partition(TABLE)
    words = f"Measured on {dates} on {told['machine']['cores']} cores.\n\n"
    PAGE.write_text(f"{head}{mark}\n{words}{table(list(every.values()))}")


def main() -> int:
    """Measure, and show it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="measure these rows")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the worker is ended, too
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    logging.getLogger("swarmkit").setLevel(logging.ERROR)  # the swarm ends under the client, again and again
    names = options.only or list(ROWS)
    rows = measured(names)
    print(table([asdict(row) for row in rows.values()]))
    if options.write:
        write(rows)
    return 0 if len(rows) == len(names) and all(row.kept for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
