"""`swarmkit fingerprint`: what a server must be given to take blocks from any peer."""

from __future__ import annotations

from rich.progress import Progress

from swarmkit.cli import console
from swarmkit.cli.app import Json, Model, app


@app.command()
def fingerprint(model: Model, json: Json = False) -> None:
    """Show the fingerprint of a model that covers the hash of each of its blocks.

    A server that is given it takes blocks from any peer, and refuses every block that was changed. To compute
    it, each block must have been on this machine once: those that never were are fetched from the Hub.

    Examples:

        swarmkit fingerprint Qwen/Qwen3-32B
    """
    console.setup(False)
    console.quiet_transformers()
    from swarmkit.models.checkpoint.checkpoint import Checkpoint
    from swarmkit.models.checkpoint.store_hub import HubFiles
    from swarmkit.models.checkpoint.store_pinned import keep_manifest

    checkpoint = Checkpoint.open(model)
    with Progress(console=console.err, transient=True, disable=json) as bar:
        task = bar.add_task("hashing blocks")
        manifest = checkpoint.make_full_manifest(
            lambda done, total: bar.update(task, completed=done, total=total)
        )
    assert isinstance(checkpoint.files, HubFiles), "else there is no such manifest"
    keep_manifest(checkpoint.files.store, manifest)
    if json:
        console.emit_json(
            model=checkpoint.name,
            fingerprint=manifest.full_fingerprint,
            without_blocks=manifest.fingerprint,
            blocks=list(manifest.blocks),
        )
        return
    console.out.print(
        f"{manifest.full_fingerprint}  covers config, files and all {len(manifest.blocks)} blocks"
    )
    console.out.print(f"{manifest.fingerprint}  covers config and files; peers meet by this one", style="dim")
    console.out.print("\nServers take blocks from any peer with:", style="bold")
    console.out.print(
        f"  swarmkit serve {model} --join ADDRESS --fingerprint {manifest.full_fingerprint}", soft_wrap=True
    )
