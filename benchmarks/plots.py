"""A picture of how far the engine is: every goal, what was measured, and what Petals was measured to do.

All are drawn on one scale on which 1 is the goal and further right is better, because their units differ. The
picture is plain SVG, written here, so that it needs no plotting library and its changes can be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _LABELS, _ROW, _TOP, _BOTTOM = 860, 420, 30, 44, 40
_LEAST, _MOST = 0.125, 8.0
"""The scale's ends, in goals; what lies beyond is drawn at the end."""
_BESIDE_LLAMA_CPP = {
    "M, 1 client, 4 servers": (1.0, 0.61),
    "S, 1 client, 2 servers": (0.9, 0.27),
    "M, 8 clients, 2 servers": (1.05, 0.40),
    "M, first token of 1,024, 2 servers": (1.54, 0.62),
}
"""Goals, and what Petals reached in a run beside llama.cpp."""


@dataclass(frozen=True)
class Goal:
    """One row: a measured value beside its target, and Petals' value where it was measured."""

    label: str
    value: float
    target: float
    petals: float | None = None
    less_is_better: bool = False

    def score(self, value: float) -> float:
        """How a value stands to the target: 1 meets it, more is better."""
        return self.target / value if self.less_is_better else value / self.target


def goals(results: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """The goals whose results are there, by the names in `run.py`."""
    found: list[Goal] = []
    if (decode := results.get("decode-s")) and (fit := decode["fit"]):
        # a base of nothing, or less by chance, has no place on a scale of ratios
        base_ms, per_server_ms = (max(fit[name], 0.1) for name in ("base_ms", "per_server_ms"))
        found.append(_below("S: ms per token beyond local, base", base_ms, 2.0, 6.5))
        found.append(_below("S: the same, per server", per_server_ms, 1.5, 5.2))
    if decode := results.get("decode-m"):
        for row in _with(decode["results"], stages=4):
            found.append(Goal("M, 4 servers: tokens/s ÷ local", row["ratio_to_local"], 0.9, 0.64))
    if clients := results.get("clients-m"):
        for dtype, target, petals in (("float32", 4.0, 1.8), ("bfloat16", 7.0, None)):
            for part in _with(clients["results"], dtype=dtype):
                for row in _with(part["clients"], clients=8):
                    label = f"M, {dtype}: 8 clients ÷ 1, tokens/s"
                    found.append(Goal(label, row["ratio_to_one"], target, petals))
    if prefill := results.get("prefill-m"):
        for row in _with(prefill["results"], stages=2):
            label = "M, 2 servers: first token after 1024 ÷ local"
            found.append(_below(label, row["ratio_to_local"], 0.65, 1.4))
    if turn := results.get("second-turn-m"):
        found.append(Goal("M: a chat's second turn, times faster", turn["times_faster"], 5.0))
    if interference := results.get("interference-m"):
        found.append(_below("M: p99 beside a prompt of 4k ÷ alone", interference["ratio_p99"], 2.0))
    if distance := results.get("distance-m"):
        chain = distance["chain"]["ratio_to_chain_bound"]
        found.append(Goal("M, 100 ms apart, 3 servers: ÷ bound", chain, 0.9))
        if lookup := distance["prompt_lookup"]:
            ratio = lookup["ratio_to_chain_bound"]
            found.append(Goal("M, 100 ms apart, speculation: ÷ bound", ratio, 2.5))
    if beside := results.get("beside-llama-cpp"):
        for name, (target, petals) in _BESIDE_LLAMA_CPP.items():
            for row in _with(beside["rows"], name=name):
                speed = row["times_as_fast_as"]["llama.cpp"]
                found.append(Goal(f"{name}: speed ÷ llama.cpp's", speed, target, petals))
    for name in ("s", "m"):
        if recovery := results.get(f"recovery-{name}"):
            label = f"{name.upper()}: recovery kept ready ÷ switched off"
            found.append(Goal(label, recovery["ratio_to_without"], 0.97))
    if faults := results.get("faults-s"):
        found.append(Goal("S: sends fail, p = 0.001: ÷ fault-free", faults["ratio_to_fault_free"], 0.95))
    if train := results.get("train-m"):
        for row in _with(train["results"], replicas=1):
            forward, both = row["forward_ratio_to_local"], row["both_ratio_to_local"]
            found.append(_below("M, 8 x 128 over 2 servers: forward ÷ local", forward, 0.65, 1.07))
            found.append(_below("M, the same: forward and backward ÷ local", both, 0.85, 1.93))
    if footprint := results.get("footprint-m"):
        found.append(_below("M, 8 blocks: processes", footprint["processes"], 2, 13))
        found.append(_below("M, 8 blocks: MB of memory", footprint["memory_bytes"] / 1e6, 730, 730))
        found.append(_below("M, 8 blocks: seconds until it serves", footprint["ready_s"], 2.8, 2.8))
    return found


def _below(label: str, value: float, target: float, petals: float | None = None) -> Goal:
    return Goal(label, value, target, petals, less_is_better=True)


def draw(rows: Sequence[Goal]) -> str:
    """The picture, as SVG."""
    height = _TOP + _ROW * len(rows) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LABELS}" y="20" fill="#555">worse ←</text>',
        f'<text x="{_x(1):.0f}" y="20" text-anchor="middle" fill="#b33">the goal</text>',
        f'<text x="{_WIDTH - 20}" y="20" text-anchor="end" fill="#555">→ better</text>',
    ]
    for number, row in enumerate(rows):
        parts += _row(row, _TOP + _ROW * number)
    bottom = height - _BOTTOM
    parts.append(
        f'<line x1="{_x(1):.0f}" y1="28" x2="{_x(1):.0f}" y2="{bottom}" stroke="#b33" stroke-width="1.5"/>'
    )
    legend = (
        "bars: measured   ○ Petals' main branch, on the same kind of machine   each step of the scale doubles"
    )
    parts.append(f'<text x="{_LABELS}" y="{height - 14}" font-size="11" fill="#555">{escape(legend)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _row(row: Goal, y: int) -> list[str]:
    left, end = _x(_LEAST), _x(row.score(row.value))
    colour = "#3a7" if row.score(row.value) >= 1 else "#c93"
    label = f"{row.label}: {row.value:.3g} ({'≤' if row.less_is_better else '≥'} {row.target:g})"
    parts = [
        f'<text x="{_LABELS - 10}" y="{y + 16}" text-anchor="end">{escape(label)}</text>',
        f'<rect x="{left:.0f}" y="{y + 4}" width="{max(end - left, 2):.0f}" height="16" fill="{colour}"/>',
    ]
    if row.petals is not None:
        parts.append(
            f'<circle cx="{_x(row.score(row.petals)):.0f}" cy="{y + 12}" r="5" fill="white" stroke="black"/>'
        )
    return parts


def _x(score: float) -> float:
    """Where a score lies, from left to right."""
    share = math.log(min(max(score, _LEAST), _MOST) / _LEAST) / math.log(_MOST / _LEAST)
    return _LABELS + share * (_WIDTH - 20 - _LABELS)


def _with(rows: Sequence[Mapping[str, Any]], **wanted: object) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]
