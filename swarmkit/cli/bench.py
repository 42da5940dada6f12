"""`swarmkit bench`: measure, as ratios within one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from swarmkit.cli import console
from swarmkit.cli.app import Json, app
from swarmkit.errors import UsageError

bench_app = typer.Typer(
    help="Measure decoding, failover and weights on this machine, with servers as processes on loopback.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench_app, name="bench")

_ModelOption = Annotated[str, typer.Option("--model", "-m", help="`tiny-chat`, a local folder or a repo id.")]
_BenchThreads = Annotated[int, typer.Option("--threads", min=1, help="Torch threads of every process.")]


@bench_app.command()
def decode(
    stages: Annotated[str, typer.Option("--stages", help="Lengths of the chain, as in 1,2,4.")] = "1,2,4",
    model: _ModelOption = "tiny-chat",
    random_llama: Annotated[
        bool, typer.Option("--random-llama", help="A random Llama of hidden size 1024 and 16 blocks instead.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens per round.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds that count.")] = 5,
    threads: _BenchThreads = 1,
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    json: Json = False,
) -> None:
    """Tokens/s, the ratio to the local model in the same run, and what each hop adds.

    Examples:

        swarmkit bench decode --stages 1,2,4 --json

        swarmkit bench decode --random-llama --tokens 32
    """
    _prepare(threads)
    from swarmkit.bench.decode import bench_decode

    try:
        counts = [int(part) for part in stages.split(",")]
    except ValueError:
        raise UsageError(f"--stages takes numbers, as in 1,2,4; got {stages!r}") from None
    with tempfile.TemporaryDirectory(prefix="swarmkit-bench-") as folder, _bar() as progress:
        if random_llama:
            from swarmkit.bench.random_llama import make_random_llama

            progress("writing a random Llama", 0, 1)
            model = str(make_random_llama(Path(folder)))
        result = bench_decode(
            model, counts, tokens=tokens, rounds=rounds, threads=threads, dtype=dtype, on_progress=progress
        )
    _report("decode", result, json, _decode_table)


@bench_app.command()
def failover(
    model: _ModelOption = "tiny-chat",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Servers to kill.")] = 5,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="Tokens per answer.")] = 64,
    threads: _BenchThreads = 1,
    seed: Annotated[int, typer.Option("--seed", help="Decides which server dies after which token.")] = 0,
    json: Json = False,
) -> None:
    """The stall from SIGKILL to the next token.

    Examples:

        swarmkit bench failover --json
    """
    _prepare(threads)
    from swarmkit.bench.failover import bench_failover

    with _bar() as progress:
        result = bench_failover(
            model, trials=trials, tokens=tokens, threads=threads, seed=seed, on_progress=progress
        )
    _report("failover", result, json, _failover_table)


@bench_app.command()
def weights(
    blocks: Annotated[int, typer.Option("--blocks", min=1, max=8, help="Blocks that both servers hold.")] = 4,
    hidden_size: Annotated[
        int, typer.Option("--hidden-size", min=64, help="Width of the random Llama; a multiple of 64.")
    ] = 1024,
    threads: _BenchThreads = 1,
    json: Json = False,
) -> None:
    """What a second server costs the Hub, when the first one gives it its blocks.

    Examples:

        swarmkit bench weights --json
    """
    _prepare(threads)
    from swarmkit.bench.weights import bench_weights

    with _bar() as progress:
        result = bench_weights(
            serve_blocks=blocks, hidden_size=hidden_size, threads=threads, on_progress=progress
        )
    _report("weights", result, json, _weights_table)


def _prepare(threads: int) -> None:
    console.setup(False, threads)
    console.quiet_transformers()
    console.set_threads(threads)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield progress


def _report(name: str, result: dict[str, Any], json: bool, table: Callable[[dict[str, Any]], Table]) -> None:
    from swarmkit.bench.environment import environment

    if json:
        console.emit_json(benchmark=name, **environment(), **result)
    else:
        console.out.print(table(result))


def _decode_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']}, {result['dtype']}, {result['threads']} thread(s) per process")
    for heading in ("stages", "tokens/s", "local", "ratio", "ms added per hop", "of it network"):
        table.add_column(heading, justify="right")
    for row in result["results"]:
        table.add_row(
            str(row["stages"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['local_tokens_per_s']:.1f}",
            f"{row['ratio_to_local']:.2f}",
            f"{row['added_ms_per_hop']:.2f}",
            f"{row['network_ms_per_hop']:.2f}",
        )
    return table


def _failover_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']}: a server in use is killed with SIGKILL")
    for heading in ("trials", "answers equal", "median stall ms", "longest", "usual ms per token"):
        table.add_column(heading, justify="right")
    table.add_row(
        str(result["trials"]),
        str(result["equal"]),
        f"{result['stall_ms_median']:.0f}",
        f"{result['stall_ms_max']:.0f}",
        f"{result['usual_ms_per_token']:.2f}",
    )
    return table


def _weights_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['blocks']} blocks of {result['block_bytes'] / 1e6:.0f} MB in all")
    for heading in ("server", "MB from the Hub", "MB from peers", "seconds to fetch", "seconds to load"):
        table.add_column(heading, justify="right")
    for server, peer_bytes in (("first", 0), ("second", result["peer_bytes_second"])):
        table.add_row(
            server,
            f"{result[f'hub_bytes_{server}'] / 1e6:.1f}",
            f"{peer_bytes / 1e6:.1f}",
            f"{result[f'fetch_seconds_{server}']:.2f}",
            f"{result[f'load_seconds_{server}']:.2f}",
        )
    return table
