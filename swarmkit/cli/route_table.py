"""A route, hop by hop, with where the time went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from swarmkit.events import StepFinished


def route_table(trace: Sequence[StepFinished], last: int = 32) -> Table:
    """The route of the last step; times are medians over the last single-token steps on that route.

    Bytes are those of the last of these; `-` goes out where the server before hands on what came in from it.
    What a step had to wait for is shown where some step had: a terminal is 80 columns wide.
    """
    route = [(hop.peer_id, hop.start, hop.stop) for hop in trace[-1].hops]
    same = [
        step
        for step in trace
        if step.tokens == 1 and [(hop.peer_id, hop.start, hop.stop) for hop in step.hops] == route
    ][-last:] or [trace[-1]]
    table = Table(show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("hop")
    table.add_column("blocks")
    shown = [
        ("queue ms", "queue_ms", ".2f"),
        ("compute", "compute_ms", ".2f"),
        ("network", "network_ms", ".2f"),
    ]
    if any(hop.ahead for step in same for hop in step.hops):
        shown += [("ahead", "ahead", ".0f"), ("expected", "expected_wait_ms", ".2f")]
    for heading, _, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bytes out, in", justify="right")
    for index, hop in enumerate(trace[-1].hops):
        columns = [step.hops[index] for step in same]
        table.add_row(
            f"{index + 1}. {hop.label}",
            f"{hop.start}:{hop.stop}",
            *(
                f"{statistics.median(getattr(column, name) for column in columns):{form}}"
                for _, name, form in shown
            ),
            f"{_carried(columns[-1].sent_bytes, columns[-1].sent_codec)}, "
            f"{_carried(columns[-1].received_bytes, columns[-1].received_codec)}",
        )
    return table


def _carried(nbytes: int, codec: str) -> str:
    if not nbytes:
        return "-"
    return f"{nbytes:,}" if codec == "none" else f"{nbytes:,} {codec}"
