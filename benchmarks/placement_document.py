"""The plots of the rows of `placement.py`, and the table of docs/placement.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from placement_runs import Row

from swarmkit.simulation.plots import draw_curves

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "placement.md"
BEGIN, END = "<!-- results: python benchmarks/placement.py --document -->\n", "<!-- end of results -->\n"


def plots() -> None:
    """Draw the results that have curves."""
    for name, title, x_label, key in (
        ("thousand", "1,000 servers: tokens per second ÷ upper bound", "hours", ("rule", "churn_per_hour")),
        ("azure", "Share of answers that took no longer", "seconds", ("case",)),
    ):
        path = RESULTS / f"placement-{name}.json"
        if path.exists():
            rows = json.loads(path.read_text())["results"]
            curves = {" ".join(str(row[one]) for one in key): row["curve"] for row in rows}
            (RESULTS / f"placement-{name}.svg").write_text(draw_curves(title, x_label, "", curves))


def lines(found: Mapping[str, Row]) -> list[str]:
    """The table of docs/placement.md, as far as there are results: scenario, target, found."""
    rows: list[tuple[str, str, str]] = []
    if one := found.get("thousand"):
        for rule, name in (("ours", "our rule"), ("petals", "Petals' rule, without moves")):
            still, churn = (
                next(r for r in one["results"] if r["rule"] == rule and bool(r["churn_per_hour"]) is moving)
                for moving in (False, True)
            )
            target = "≥ 0.95; ≥ 0.90" if rule == "ours" else "beside it"
            text = f"{still['rate_to_bound']:.3f}; {churn['rate_to_bound']:.3f}"
            rows.append(
                (f"1,000 mixed servers, {name}: rate ÷ bound, still; 10 % churn an hour", target, text)
            )
    if one := found.get("small"):
        for key, name, target in (
            ("planned", "planned at once", "mean ≤ 5 %, worst ≤ 10 %"),
            ("planned_equal_memories", "planned at once, equal memories", "0"),
            ("one_by_one", "our rule, one by one with moves", "beside it"),
            ("petals", "Petals' rule, one by one", "beside it"),
        ):
            text = f"mean {one[key]['mean']:.2%}, worst {one[key]['worst']:.2%}"
            rows.append((f"{one['instances']} small instances, {name}: gap to the optimum", target, text))
        if one["not_proven"]:
            text = "compared with a bound that may be above the optimum"
            rows.append((f"… of which without a proven optimum: {one['not_proven']}", "", text))
    if one := found.get("bloom"):
        text = f"worst {one['worst_ours_to_theirs']:.2f} ×"
        rows.append(("BLOOM-176B, 16 cells: ours ÷ theirs", "≤ 1.10 in each", text))
        near = sum(abs(row["petals_error"]) <= 0.35 for row in one["results"])
        text = f"{near} of {len(one['results'])} cells; worst {one['worst_petals_error']:+.0%}"
        rows.append(("BLOOM-176B: Petals in this simulator against reported", "within 35 % in each", text))
    if one := found.get("azure"):
        for row in one["results"]:
            text = f"{row['answer_s']:.1f} s, {row['answer_p95_s']:.1f} s, {row['waited_s']:.2f} s"
            text += f", {row['lost']:g} lost" if row["lost"] else ""
            target = "≤ 7.3, ≤ 15.2, ≤ 0.6 s" if row["case"] == "as reported" else "beside it"
            rows.append((f"Llama-2-7B, Azure, {row['case']}: mean, 95th, waiting", target, text))
    if one := found.get("helix"):
        for network in ("one cluster", "three regions"):
            rates = {
                row["placement"]: row["decode_tokens_per_s"]
                for row in one["results"]
                if row["network"] == network
            }
            text = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            rows.append((f"Llama-2-70B, 24 nodes, {network}: tokens/s", "better than both", text))
        rows.append(("… placed in", "< 1 s", "not comparable on a busy machine; see its file"))
    if one := found.get("t4"):
        for row in one["results"]:
            asked = row["answers"] + row["lost"] + row["turned_away"]
            text = f"{row['lost_while_covered']} lost and {row['turned_away']} turned away of {asked}; "
            text += f"longest gap {row['longest_gap_s']:.0f} s"
            rows.append((f"T4 trace, {row['departures']}", "none lost while covered; ≤ 20 s", text))
    if one := found.get("waiting"):
        for row in one["results"]:
            text = f"{row['waiting_to_answer']:.1%}" + (f", {row['lost']} lost" if row["lost"] else "")
            swarm = row["swarm"] + (f", {row['clients']} clients" if row.get("clients", 1) > 1 else "")
            rows.append((f"Waiting ÷ answer at 0.7 of capacity, {swarm}", "≤ 15 %", text))
    if one := found.get("decisions"):
        for row, target in zip(one["results"], ("35 ms", "1 s", "near n log n"), strict=True):
            text = f"{row['choose_s'] * 1e3:.0f} ms; {row['should_move_s'] * 1e3:.0f} ms"
            rows.append((f"One decision among {row['servers']:,} servers: choose; move", target, text))
        if several := one.get("together"):
            text = f"{several['better_place_s'] * 1e3:.0f} ms"
            rows.append((f"… among {several['servers']}, with moves that help together", "35 ms", text))
    return [
        "| scenario | target | found |",
        "| --- | --- | --- |",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]


def bloom_lines(found: Row) -> list[str]:
    """The cells of BLOOM-176B: reported and simulated, in seconds per token."""
    heads = "requests/s", "tokens", "Petals", "simulated", "theirs", "ours", "ours without allocation"
    table = ["| where | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for row in found["results"]:
        cells = [row["where"], row["rate"], row["answer_tokens"], row["petals_reported_s"], row["petals_s"]]
        cells += [row["theirs_reported_s"], row["ours_s"], row["ours_without_allocation_s"]]
        table.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return table


def document() -> None:
    """Write the results that are there into docs/placement.md, between its two marks."""
    found = {path.stem.removeprefix("placement-"): json.loads(path.read_text()) for path in _files()}
    parts = ["", *lines(found), ""]
    if "bloom" in found:
        parts += ["Seconds per token of BLOOM-176B, cell by cell:", "", *bloom_lines(found["bloom"]), ""]
    for name, text in (
        ("thousand", "Tokens per second ÷ upper bound of 1,000 servers, over an hour"),
        ("azure", "Share of Azure's requests that were answered within some seconds"),
    ):
        if (RESULTS / f"placement-{name}.svg").exists():
            parts += [f"![{text}](../benchmarks/results/placement-{name}.svg)", ""]
    page = DOCUMENT.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + "\n".join(parts) + END + after)


def _files() -> list[Path]:
    return sorted(RESULTS.glob("placement-*.json"))
