"""What commands show: one clear line per event for people, one JSON object per line for programs.

Where a command can be read by a program, everything meant for people goes to standard error, so that standard
output holds nothing but the result.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from swarmkit.huge_pages import ask_for_huge_pages

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def setup(verbose: bool, threads: int | None = None) -> None:
    """Prepare logging, torch's memory, and its threads if given. Call before anything heavy is imported."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ask_for_huge_pages()
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False, rich_tracebacks=False)],
    )
    for noisy in ("hivemind", "httpx", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextmanager
def importing() -> Iterator[None]:
    """Import much within the block: all of it stays, so that no garbage is looked for in it, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_transformers() -> None:
    """Keep transformers' own bars and advice out of our output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def set_threads(threads: int | None) -> None:
    """Let torch use so many threads; None = as many as it likes."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def to_stderr() -> None:
    """Show people everything on standard error: the result alone goes to standard output."""
    global out
    out = err


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show that something is under way, and for how long."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def date(moment: float) -> str:
    """A Unix time in seconds, for people."""
    return f"{datetime.fromtimestamp(moment, timezone.utc):%Y-%m-%d %H:%M} UTC"


def fail(error: BaseException) -> None:
    """Say what went wrong, in one paragraph."""
    err.print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True)


def emit_json(**fields: Any) -> None:
    """One JSON object on a line of its own, at once."""
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
    sys.stdout.flush()
