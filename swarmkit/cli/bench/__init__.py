"""`swarmkit bench`: a command for each benchmark, made from the fields of its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from swarmkit.bench.options import BENCHMARKS, Benchmark
from swarmkit.cli import console
from swarmkit.cli.app import Json, app
from swarmkit.cli.interrupt import interruptible
from swarmkit.errors import UsageError

bench_app = typer.Typer(
    help="Measure a swarm on this machine, its servers as processes on loopback.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench_app, name="bench")


def command_of(benchmark: type[Benchmark]) -> Callable[..., None]:
    """Return the function of a command: an option for each field, and `--json`.

    A field of several values is an option in which these are separated by commas.
    """
    types = get_type_hints(benchmark)
    parameters = [_parameter(each, types[each.name]) for each in fields(benchmark)]
    json = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)

    def command(json: bool, **given: Any) -> None:
        values = {
            each.name: _parsed(given[each.name], types[each.name], _flag(each)) for each in fields(benchmark)
        }
        _run(benchmark(**values), json)

    signature = inspect.Signature([*parameters, json])
    command.__doc__ = benchmark.__doc__
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    return command


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    about = field.metadata
    several = get_args(kind)
    assert field.default is not MISSING
    default = ",".join(str(each) for each in field.default) if several else field.default
    names = [] if kind is bool else [_flag(field)]  # of a switch, typer makes `--x/--no-x`
    option = typer.Option(
        *names,
        *([about["short"]] if "short" in about else []),
        min=about.get("min"),
        max=about.get("max"),
        help=about["help"],
    )
    annotation = Annotated[(str if several else kind, option)]  # type: ignore[valid-type]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _flag(field: Field[Any]) -> str:
    return str(field.metadata.get("flag", f"--{field.name.replace('_', '-')}"))


def _parsed(value: Any, kind: Any, flag: str) -> Any:
    """Take several values apart.

    Raises:
        UsageError: whole numbers above 0 are wanted, and something else was given.
    """
    several = get_args(kind)
    if not several:
        return value
    parts = value.split(",")
    if several[0] is str:
        return tuple(parts)
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{flag} takes numbers, as in 1,2,4; got {value!r}")
    return numbers


def _run(benchmark: Benchmark, json: bool) -> None:
    with _bar(getattr(benchmark, "threads", 1)) as progress, interruptible():
        result = benchmark.run(progress)
    if json:
        from swarmkit.bench.environment import environment

        console.emit_json(benchmark=benchmark.name, **environment(), **result)
    else:
        from swarmkit.cli.bench.tables import TABLES

        console.out.print(TABLES[benchmark.name](result))
    if not result.get("sound", True):
        for line in [*result["left"], *result["errors"]]:
            console.err.print(f"[red]{line}[/]")
        raise typer.Exit(1)


@contextmanager
def _bar(threads: int) -> Iterator[Callable[[str, int, int], None]]:
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


for _benchmark in BENCHMARKS:
    bench_app.command(_benchmark.name)(command_of(_benchmark))
