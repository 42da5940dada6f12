"""`swarmkit check`: can this architecture be cut into blocks?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Json, Verbose, app


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="`tiny-chat`, a folder, a Hub repo id, a config.json, or a bare model type such as `llama`."
        ),
    ],
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Find out whether models of an architecture can be served.

    Makes a tiny random model like the given one from its config alone (no weights are read or fetched), cuts
    it at every boundary between two blocks, and compares what the pieces compute with what the whole
    computes: for a prompt, for the tokens after it, and for gradients. Takes seconds. A server makes the very
    same check before it serves an architecture for the first time.

    Exits with code 1 if they differ, or the architecture cannot be cut at all.

    Examples:

        swarmkit check Qwen/Qwen3-8B

        swarmkit check ./my-model/config.json --json | jq .agrees

        swarmkit check olmo3
    """
    console.setup(verbose, threads=None)
    console.quiet_transformers()
    from swarmkit.models.check import TOLERANCE, check_architecture, config_of

    verdict = check_architecture(config_of(model))
    if json:
        fields = asdict(verdict)
        # JSON has no infinity.
        finite = {k: v for k, v in fields.items() if not (isinstance(v, float) and v == float("inf"))}
        console.emit_json(**(dict.fromkeys(fields) | finite))
    elif verdict.agrees:
        console.out.print(
            f"[bold green]agrees[/] {verdict.model_type}: cut in {verdict.cuts} ways, it is the same model"
        )
    else:
        console.out.print(f"[bold red]differs[/] {verdict.model_type}: {verdict.reason}", soft_wrap=True)
    if not json and verdict.cuts:
        console.out.print(
            f"largest difference: prefill {verdict.worst_prefill:.1e}, decoding {verdict.worst_decode:.1e}, "
            f"backward {verdict.worst_backward:.1e} (at most {TOLERANCE:.0e} counts as equal); "
            f"{verdict.seconds:.1f} s",
            style="dim",
            soft_wrap=True,
        )
    if not verdict.agrees:
        raise typer.Exit(1)
