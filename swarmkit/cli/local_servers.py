"""A local swarm of server processes, with a progress bar while it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from swarmkit.cli import console

if TYPE_CHECKING:
    from swarmkit.local.swarm import LocalSwarm

_STAGES = 2
_REPLICAS = 2


def start_servers(model: str) -> LocalSwarm:
    """Start two server processes for each half of a model, and print where they are."""
    from swarmkit.local.swarm import LocalSwarm

    total = _STAGES * _REPLICAS
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console.err, transient=True) as bar:
        task = bar.add_task(f"starting {total} server processes", total=total)
        swarm = LocalSwarm(
            model,
            num_stages=_STAGES,
            replicas=_REPLICAS,
            processes=True,
            on_progress=lambda ready, _: bar.update(task, completed=ready),
        )
        swarm.start()
    console.out.print(f"[green]●[/] {total} servers of [bold]{model}[/], each a process of its own:")
    for server in swarm.servers:
        low, high = server.blocks
        console.out.print(f"    {server.public_name}  blocks {low}:{high}  pid {server.pid}")  # type: ignore[attr-defined]
    return swarm
