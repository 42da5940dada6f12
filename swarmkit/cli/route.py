"""`swarmkit route`: the way that a token would take, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from swarmkit.cli import console
from swarmkit.cli.app import (
    Json,
    Model,
    app,
)
from swarmkit.cli.options import ProcessOptions, SwarmOptions, with_groups

if TYPE_CHECKING:
    from swarmkit.client.route_report import HopReason, RouteReport
    from swarmkit.client.routing.forecast import ForecastPart


@app.command()
@with_groups
def route(
    swarm: SwarmOptions,
    process: ProcessOptions,
    model: Model,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why, what to expect, and what would make it faster.")
    ] = False,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="The prompt for which the first token is forecast.")
    ] = 128,
    json: Json = False,
) -> None:
    """Show the servers that a session would use now.

    The servers on the route are asked for a few tokens of noise, to measure them. With `--explain` the
    command also says what the alternatives are, how fast a session would be, where the time goes, what one
    more server would bring, and whether this machine alone would be faster.

    Examples:

        swarmkit route tiny-chat --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo… --explain

        swarmkit route tiny-chat --join … --json | jq .forecast.tokens_per_s
    """
    process.prepare()
    from swarmkit.client.route_report import explain_route

    with (
        swarm.model(model) as client,
        console.busy("measuring the servers on the route"),
    ):
        report = explain_route(client, prompt_tokens, alone=explain or json)
    if json:
        console.emit_json(**{name: _finite(value) for name, value in report.to_json().items()})
        return
    console.out.print(_table(report))
    if explain:
        for line in _explanation(report):
            console.out.print(line)


def _finite(value: object) -> object:
    """The value with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(report: RouteReport) -> Table:
    table = Table(
        title=f"{report.model} · {report.num_blocks} blocks", title_justify="left", title_style="bold"
    )
    for heading in ("server", "blocks", "way ms", "queue", "compute", "free cache"):
        table.add_column(heading, justify="left" if heading in ("server", "blocks") else "right")
    for hop in report.hops:
        facts = hop.facts
        table.add_row(
            facts.label,
            f"{facts.start}:{facts.stop}",
            f"{facts.round_trip_s * 1e3:.1f}",
            f"{facts.queue_s * 1e3:.1f}",
            f"{facts.compute_s * 1e3:.1f}" + ("" if facts.measured else " (as announced)"),
            f"{hop.free_cache_tokens:,}",
        )
    return table


def _explanation(report: RouteReport) -> list[Text]:
    found, lines = report.forecast, [_why(hop) for hop in report.hops]
    lines.append(
        Text.assemble(
            ("Expect ", "bold"),
            f"{found.tokens_per_s:.1f} tokens/s, and the first token of a prompt of "
            f"{report.prompt_tokens} tokens after {found.first_token_s:.2f} s.",
        )
    )
    share = found.bottleneck.seconds / max(found.token_s, 1e-9)
    lines.append(Text(f"The bottleneck is {_named(found.bottleneck)}: {share:.0%} of a token's time."))
    lines.append(
        Text(
            f"All servers of the weakest block together claim {report.swarm_rate:.1f} tokens/s for everybody."
        )
    )
    if report.heads:
        label, seconds = report.heads[0]
        others = f", and {len(report.heads) - 1} more offer it" if len(report.heads) > 1 else ""
        lines.append(
            Text(
                f"Embeddings and output layer take {report.own_s * 1e3:.1f} ms here; {label} says that it "
                f"computes the output layer in {seconds * 1e3:.1f} ms, with the way there and back{others}."
            )
        )
    if (more := report.one_more) is None:
        lines.append(Text("One more server would not make this route faster."))
    else:
        lines.append(
            Text(
                f"One more server with blocks {more.start}:{more.stop}, as fast and as near as the best "
                f"here, would bring {more.forecast.tokens_per_s:.1f} tokens/s."
            )
        )
    if report.local_token_s is None:
        lines.append(Text("This machine has no room for the whole model, or lacks its weights."))
    elif report.is_faster_alone:
        alone = 1 / max(report.local_token_s, 1e-9)
        lines.append(
            Text(f"This machine alone would be faster: {alone:.1f} tokens/s without the swarm.", "yellow")
        )
    else:
        alone = 1 / max(report.local_token_s, 1e-9)
        lines.append(Text(f"This machine alone would be slower: {alone:.1f} tokens/s."))
    return lines


def _why(hop: HopReason) -> Text:
    facts = hop.facts
    name = f"{facts.label} {facts.start}:{facts.stop}"
    said = f"it announces {hop.announced_rate:.1f} tokens/s, measured {hop.announced_age_s:.0f} s before"
    if not hop.runner_up:
        return Text(f"{name}: nobody else has these blocks; {said}.")
    others = "one other has" if hop.others == 1 else f"{hop.others} others have"
    return Text(
        f"{name}: {others} all these blocks; the next best way, {' → '.join(hop.runner_up)}, "
        f"would cost {hop.runner_up_costs_s * 1e3:.1f} ms more; {said}."
    )


def _named(part: ForecastPart) -> str:
    names = {"way": "the way", "queue": "the queue at", "compute": "computing at", "client": "the work of"}
    return f"{names[part.kind]} {part.where}"
