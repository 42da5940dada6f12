"""The table that people are shown of each benchmark's result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table


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


def _decode(result: dict[str, Any]) -> Table:
    table = make_table(
        conditions(result),
        ("stages", "tokens/s", "local", "ratio", "ms added per hop", "of it network"),
        [
            (
                row["stages"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['local_tokens_per_s']:.1f}",
                f"{row['ratio_to_local']:.2f}",
                f"{row['added_ms_per_hop']:.2f}",
                f"{row['network_ms_per_hop']:.2f}",
            )
            for row in result["results"]
        ],
    )
    if fit := result["fit"]:
        table.caption = (
            f"beyond local, a token takes {fit['base_ms']:.2f} ms + {fit['per_server_ms']:.2f} ms per server"
        )
    return table


def _clients(result: dict[str, Any]) -> Table:
    table = make_table(
        f"{result['model']}, {result['stages']} servers, {result['threads']} thread(s) per process",
        ("dtype", "clients", "tokens/s", "ratio to one", "ms per token", "clients' share of the CPU"),
        [
            (
                part["dtype"],
                row["clients"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['ratio_to_one']:.2f}",
                f"{row['ms_per_token']:.1f}",
                f"{row['client_cpu_share']:.2f}",
            )
            for part in result["results"]
            for row in part["clients"]
        ],
    )
    checks = (
        f"{part['generate']['equal']} of {part['generate']['clients']} in {part['dtype']}"
        for part in result["results"]
    )
    table.caption = "answers at the same time that are the local model's: " + ", ".join(checks)
    return table


def _prefill(result: dict[str, Any]) -> Table:
    return make_table(
        f"a prompt of {result['prompt_tokens']} tokens, {conditions(result)}",
        ("stages", "seconds to the first token", "local", "ratio"),
        [
            (
                row["stages"],
                f"{row['first_token_s']:.3f}",
                f"{row['local_first_token_s']:.3f}",
                f"{row['ratio_to_local']:.2f}",
            )
            for row in result["results"]
        ],
    )


def _interference(result: dict[str, Any]) -> Table:
    table = make_table(
        f"decode beside a prompt of {result['prefill_tokens']} tokens, {conditions(result)}",
        ("", "steps", "median ms", "99th percentile", "longest"),
        [
            (
                name,
                result[name]["steps"],
                f"{result[name]['p50_ms']:.1f}",
                f"{result[name]['p99_ms']:.1f}",
                f"{result[name]['max_ms']:.1f}",
            )
            for name in ("alone", "beside")
        ],
    )
    table.caption = f"the 99th percentile grows {result['ratio_p99']:.2f} times"
    return table


def _distance(result: dict[str, Any]) -> Table:
    bound = result["bound_tokens_per_s"]
    table = make_table(
        f"{result['stages']} servers, {result['round_trip_ms']:g} ms apart, "
        f"{result['bandwidth'] / 1e6:g} Mbit/s, {conditions(result)}",
        (
            "",
            "tokens/s",
            f"÷ chain bound {bound['chain']:.2f}",
            f"÷ relayed bound {bound['relayed']:.2f}",
            "÷ plain",
        ),
        [
            (
                name.replace("_", " "),
                f"{result[name]['tokens_per_s']:.2f}",
                f"{result[name]['ratio_to_chain_bound']:.2f}",
                f"{result[name]['ratio_to_relayed_bound']:.2f}",
                f"{result[name]['ratio_to_plain']:.2f}" if "ratio_to_plain" in result[name] else "",
            )
            for name in ("chain", "relayed", *("prompt_lookup", "prompt_lookup_without_repeats", "draft"))
            if result[name]
        ],
    )
    table.caption = f"without delay, a link adds {result['emulator_ms']:.2f} ms to a round trip"
    return table


def _faults(result: dict[str, Any]) -> Table:
    return make_table(
        f"each send fails with p = {result['probability']:g}, {conditions(result)}",
        ("tokens/s", "without faults", "ratio", "failed sends", "answers equal"),
        [
            (
                f"{result['tokens_per_s']:.1f}",
                f"{result['fault_free_tokens_per_s']:.1f}",
                f"{result['ratio_to_fault_free']:.2f}",
                f"{result['failed_sends']} of {result['sends']}",
                f"{result['equal']} of {result['rounds']}",
            )
        ],
    )


def _failover(result: dict[str, Any]) -> Table:
    return make_table(
        f"{result['model']}: a server in use is killed with SIGKILL",
        ("trials", "answers equal", "median stall ms", "longest", "usual ms per token"),
        [
            (
                result["trials"],
                result["equal"],
                f"{result['stall_ms_median']:.0f}",
                f"{result['stall_ms_max']:.0f}",
                f"{result['usual_ms_per_token']:.2f}",
            )
        ],
    )


def _second_turn(result: dict[str, Any]) -> Table:
    return make_table(
        f"a second turn after {result['history_tokens']} tokens, {conditions(result)}",
        ("seconds to the first token", "without kept pages", "times faster"),
        [
            (
                f"{result['first_token_s']:.3f}",
                f"{result['first_token_without_s']:.3f}",
                f"{result['times_faster']:.1f}",
            )
        ],
    )


def _codecs(result: dict[str, Any]) -> Group:
    agreement: Table = make_table(
        f"{result['stages']} servers, {result['questions']} questions, {conditions(result)}",
        ("codec", "bytes/token", "÷ none", "equal answers", "equal tokens", "max logit difference"),
        [
            (
                row["codec"],
                f"{row['bytes_per_token']:,}",
                f"{row['ratio_of_bytes']:.3f}",
                f"{row['equal_answers']:.1%}",
                f"{row['equal_tokens']:.1%}",
                f"{row['max_logit_difference']:.2g}",
            )
            for row in result["agreement"]
        ],
    )
    speed = make_table(
        f"links of {result['bandwidth'] / 1e6:g} Mbit/s and {result['round_trip_ms']:g} ms there and back",
        ("codec", "tokens/s", "÷ none", f"first of {result['prompt_tokens']} tokens, s", "÷ none"),
        [
            (
                row["codec"],
                f"{row['tokens_per_s']:.2f}",
                f"{row['ratio_to_none']:.2f}",
                f"{row['first_token_s']:.2f}",
                f"{row['first_token_ratio_to_none']:.2f}",
            )
            for row in result["speed"]
        ],
    )
    return Group(agreement, speed)


def _footprint(result: dict[str, Any]) -> Table:
    return make_table(
        f"{result['blocks']} blocks of {conditions(result)}",
        ("processes", "MB in all", "MB of weights", "MB beyond them", "seconds until it serves", "÷ imports"),
        [
            (
                result["processes"],
                f"{result['memory_bytes'] / 1e6:.0f}",
                f"{result['weights_bytes'] / 1e6:.0f}",
                f"{result['memory_beyond_weights_bytes'] / 1e6:.0f}",
                f"{result['ready_s']:.1f}",
                f"{result['ready_ratio_to_imports']:.2f}" if "ready_ratio_to_imports" in result else "",
            )
        ],
    )


def _weights(result: dict[str, Any]) -> Table:
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


def _soak(result: dict[str, Any]) -> Table:
    table = make_table(
        f"{result['clients']} clients on {result['servers']} servers for {result['minutes']:g} minutes",
        ("what happened", "times"),
        list(result["counts"].items()),
    )
    table.caption = "nothing is left" if not result["left"] else f"{len(result['left'])} things are left"
    return table


def _train(result: dict[str, Any]) -> Table:
    table = make_table(
        f"{result['batch']} x {result['tokens']} tokens, {conditions(result)}",
        (
            "servers",
            "forward ÷ local",
            "forward + backward ÷ local",
            "without output layer",
            "forward s",
            "both s",
            "MB per step",
        ),
        [
            (
                f"{row['replicas']} x {result['stages']}",
                f"{row['forward_ratio_to_local']:.2f}",
                f"{row['both_ratio_to_local']:.2f}",
                f"{row['blocks_forward_ratio_to_local']:.2f}, {row['blocks_both_ratio_to_local']:.2f}",
                f"{row['forward_s']:.3f}",
                f"{row['both_s']:.3f}",
                f"{(row['bytes_sent_per_step'] + row['bytes_received_per_step']) / 1e6:.1f}",
            )
            for row in result["results"]
        ],
    )
    largest = max(row["largest_gradient_difference"] for row in result["results"])
    table.caption = f"gradients differ from the local model's by {largest:.1e} at most"
    return table


def _recovery(result: dict[str, Any]) -> Table:
    return make_table(
        conditions(result),
        ("tokens/s", "without recovery", "ratio"),
        [
            (
                f"{result['tokens_per_s']:.1f}",
                f"{result['tokens_per_s_without']:.1f}",
                f"{result['ratio_to_without']:.2f}",
            )
        ],
    )


def _handover(result: dict[str, Any]) -> Table:
    return make_table(
        f"a server that leaves, {result['round_trip_ms']:g} ms, {result['bandwidth'] / 1e6:g} Mbit/s, "
        f"{conditions(result)}",
        (
            "tokens held",
            "seconds handed over",
            "replayed",
            "ratio",
            "as chosen",
            "handed over by choice",
            "MB",
        ),
        [
            (
                row["history_tokens"],
                f"{row['handover_s']:.3f}",
                f"{row['replay_s']:.3f}",
                f"{row['replay_to_handover']:.2f}",
                f"{row['chosen_s']:.3f}",
                f"{row['handed_over_by_choice']} of {row['moves_by_choice']}",
                f"{row['handover_bytes'] / 1e6:.1f}",
            )
            for row in result["results"]
        ],
    )


TABLES: dict[str, Callable[[dict[str, Any]], RenderableType]] = {
    "decode": _decode,
    "clients": _clients,
    "prefill": _prefill,
    "interference": _interference,
    "distance": _distance,
    "faults": _faults,
    "failover": _failover,
    "handover": _handover,
    "second-turn": _second_turn,
    "codecs": _codecs,
    "footprint": _footprint,
    "weights": _weights,
    "soak": _soak,
    "train": _train,
    "recovery": _recovery,
}
"""By the name of the benchmark."""
