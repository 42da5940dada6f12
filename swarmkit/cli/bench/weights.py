"""`swarmkit bench weights`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from swarmkit.cli.app import Json
from swarmkit.cli.bench.common import BenchThreads, bar, bench_app, make_table, report


@bench_app.command()
def weights(
    blocks: Annotated[int, typer.Option("--blocks", min=1, max=8, help="Blocks that both servers hold.")] = 4,
    hidden_size: Annotated[
        int, typer.Option("--hidden-size", min=64, help="Width of the random Llama; a multiple of 64.")
    ] = 1024,
    threads: BenchThreads = 1,
    json: Json = False,
) -> None:
    """What a second server costs the Hub, when the first one gives it its blocks.

    Examples:

        swarmkit bench weights --json
    """
    with bar(threads) as progress:
        from swarmkit.bench.weights import bench_weights

        result = bench_weights(
            serve_blocks=blocks, hidden_size=hidden_size, threads=threads, on_progress=progress
        )
    report("weights", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    return make_table(
        f"{result['blocks']} blocks of {result['block_bytes'] / 1e6:.0f} MB in all",
        ("server", "MB from the Hub", "MB from peers", "seconds to fetch", "seconds to load"),
        [
            (
                server,
                f"{result[f'hub_bytes_{server}'] / 1e6:.1f}",
                f"{peer_bytes / 1e6:.1f}",
                f"{result[f'fetch_seconds_{server}']:.2f}",
                f"{result[f'load_seconds_{server}']:.2f}",
            )
            for server, peer_bytes in (("first", 0), ("second", result["peer_bytes_second"]))
        ],
    )
