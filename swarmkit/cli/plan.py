"""`swarmkit plan`: how many blocks fit into a machine, and how many machines a model needs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from swarmkit.cli import console
from swarmkit.cli.app import Json, Model, app


@app.command()
def plan(
    model: Model,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Memory of one machine, as in 24GiB; this machine's if left out."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or mps.")] = "cpu",
    cache_tokens: Annotated[
        int, typer.Option("--cache-tokens", min=1, help="Tokens that the cache shall hold.")
    ] = (16_384),
    json: Json = False,
) -> None:
    """Show, for each precision, how many blocks fit and how many such machines hold the whole model.

    Only the model's config is read; of weights that are stored quantised, which have one precision, also the
    headers of their files.

    Examples:

        swarmkit plan Qwen/Qwen3-32B --memory 24GiB

        swarmkit plan tiny-chat --json
    """
    console.setup(False)
    console.quiet_transformers()
    from swarmkit.models.checkpoint.checkpoint import Checkpoint
    from swarmkit.models.plan import device_memory_bytes, plan_checkpoint
    from swarmkit.models.quantization.precision import choices
    from swarmkit.sizes import format_bytes, parse_bytes

    checkpoint = Checkpoint.open(model)
    memory_bytes = parse_bytes(memory) if memory else device_memory_bytes(device)
    plans = [
        plan_checkpoint(checkpoint, memory_bytes, precision, cache_tokens=cache_tokens, device=device)
        for precision in choices(checkpoint.config, device)
    ]
    if json:
        console.emit_json(
            model=checkpoint.name,
            num_blocks=checkpoint.num_blocks,
            memory_bytes=memory_bytes,
            cache_tokens=cache_tokens,
            precisions={
                p.precision: {
                    "block_bytes": p.block_bytes,
                    "kv_bytes_per_block": p.kv_bytes_per_block,
                    "workspace_bytes": p.workspace_bytes,
                    "blocks_that_fit": p.blocks_that_fit,
                    "machines_needed": p.machines_needed,
                }
                for p in plans
            },
        )
        return
    table = Table(
        title=f"{checkpoint.name}: {checkpoint.num_blocks} blocks, machines of {format_bytes(memory_bytes)}, "
        f"cache for {cache_tokens:,} tokens",
        title_justify="left",
    )
    for heading in ("precision", "a block", "its cache", "workspace", "blocks that fit", "machines for all"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for p in plans:
        table.add_row(
            p.precision,
            format_bytes(p.block_bytes),
            format_bytes(p.kv_bytes_per_block),
            format_bytes(p.workspace_bytes),
            str(p.blocks_that_fit) if p.blocks_that_fit else "[red]none[/]",
            str(p.machines_needed) if p.machines_needed else "–",
        )
    console.out.print(table)
