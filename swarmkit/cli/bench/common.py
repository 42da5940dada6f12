"""What the benchmarks' commands share: options, progress, and how results are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from swarmkit.cli import console
from swarmkit.cli.app import app
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.bench.subject import Subject

bench_app = typer.Typer(
    help="Measure a swarm on this machine, its servers as processes on loopback.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench_app, name="bench")

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="`S`, `M` or `L` (random Llamas of hidden size 256, 1024 and 4096; L is 16 GB), `tiny-chat`, "
        "a folder or a repo id.",
    ),
]
BenchThreads = Annotated[int, typer.Option("--threads", min=1, help="Torch threads of every process.")]
BenchDType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, int8 or nf4.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds that count; one more comes before.")]
Stages = Annotated[int, typer.Option("--stages", min=1, help="Servers in the chain.")]
Tokens = Annotated[int, typer.Option("--tokens", min=4, help="Tokens per round.")]

OnProgress = Callable[[str, int, int], None]


@contextmanager
def measuring(model: str, threads: int, device: str = "cpu") -> Iterator[tuple[Subject, OnProgress]]:
    """Prepare this process, open the model, and show a bar while the block runs."""
    with bar(threads) as progress:
        from swarmkit.bench.subject import open_subject

        with open_subject(model, progress, device) as subject:
            yield subject, progress


@contextmanager
def bar(threads: int) -> Iterator[OnProgress]:
    """Prepare this process, and show a bar while the block runs."""
    console.setup(False, threads)
    console.quiet_transformers()
    console.set_threads(threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True) as shown:
        task = shown.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total)

        yield progress


def counts(text: str, option: str) -> list[int]:
    """Whole numbers above 0, as in `1,2,4`.

    Raises:
        UsageError: something else.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{option} takes numbers, as in 1,2,4; got {text!r}")
    return numbers


def report(
    name: str, result: dict[str, Any], json: bool, table: Callable[[dict[str, Any]], RenderableType]
) -> None:
    """Print the result: a table, or with `json` everything, with date, machine and command."""
    from swarmkit.bench.environment import environment

    if json:
        console.emit_json(benchmark=name, **environment(), **result)
    else:
        console.out.print(table(result))


def make_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of numbers, set to the right."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def conditions(result: dict[str, Any]) -> str:
    """Model, precision and threads, for the head of a table."""
    return f"{result['model']}, {result['dtype']}, {result['threads']} thread(s) per process"
