"""What does a move cost a session: with its keys and values handed over, and with a replay?

A server that leaves brings what it holds of a session to the one that goes on, or the client sends that one
all inputs again. The client decides which, by what it has measured (`handover_choice.py`). Both are timed
here at several lengths of history, over emulated links, beside what the client chooses by itself.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from swarmkit.bench.measure import PATIENT, median_ratio
from swarmkit.bench.options import HandoverBenchmark
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.errors import UsageError
from swarmkit.events import KeysHandedOver, PeerReplaced
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.execution.stage import Stage
from swarmkit.net.emulation.link_schedule import EmulatedLink

WAYS = ("always", "never", "auto")
"""Settings of `hand_over`."""
_USUAL_STEPS = 6
_MOST_STEPS = 500
"""Within which a session has moved after its server was told to stop."""
_PAUSE_S = 0.02
_DRAIN_S = 60.0
_TOLERANCE = 1e-3
"""In float32, by which outputs may differ from the local model's: a replay computes in other pieces."""


@dataclass(frozen=True)
class _Move:
    """How a session moved.

    Attributes:
        seconds: that the step took in which it moved, beyond a usual step.
        nbytes: that were handed over; 0 = the session was replayed.
    """

    seconds: float
    nbytes: int


@dataclass
class _Row:
    """Sessions of one length, and how they moved, by the setting of their client."""

    tokens: int
    hidden: torch.Tensor
    """What they are given, step by step."""
    wanted: torch.Tensor
    """What the model makes of it."""
    moves: dict[str, list[_Move]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def values(self) -> dict[str, Any]:
        seconds = {way: [one.seconds for one in moves] for way, moves in self.moves.items()}
        median = {way: round(statistics.median(each), 4) for way, each in seconds.items()}
        return {
            "history_tokens": self.tokens,
            "handover_s": median["always"],
            "replay_s": median["never"],
            "chosen_s": median["auto"],
            "replay_to_handover": round(median_ratio(seconds["never"], seconds["always"]), 3),
            "handed_over_by_choice": sum(one.nbytes > 0 for one in self.moves["auto"]),
            "moves_by_choice": len(self.moves["auto"]),
            "handover_bytes": max(one.nbytes for one in self.moves["always"]),
        }


def measure(options: HandoverBenchmark, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Move a session again and again; the first round is not counted.

    Raises:
        AssertionError: a session did not move, or not in the way that it was told to, or computed otherwise.
    """
    torch.set_num_threads(options.threads)
    total, done = (options.rounds + 1) * len(options.history) * len(WAYS), 0
    on_progress("starting", 0, total)
    rows = _rows(options, subject)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=1,
        replicas=2,
        processes=True,
        threads=options.threads,
        dtype=options.dtype,
        link=EmulatedLink(delay_s=options.round_trip_ms / 2e3, bandwidth=options.megabits * 1e6),
    ) as swarm:
        patient = PATIENT.replace(prefix_cache_bytes=0)
        clients = {
            way: swarm.model(dtype=options.dtype, settings=patient.replace(hand_over=way)) for way in WAYS
        }
        for number in range(options.rounds + 1):
            for row in rows:
                for way, model in clients.items():
                    move = _moved(swarm, model, row, options.dtype)
                    if way != "auto" and (move.nbytes > 0) != (way == "always"):
                        raise AssertionError(f"hand_over={way}, and {move.nbytes} bytes were handed over")
                    if number:
                        row.moves[way].append(move)
                    done += 1
                    on_progress("moved a session", done, total)
    return {
        "round_trip_ms": options.round_trip_ms,
        "bandwidth": options.megabits * 1e6,
        **options.values("rounds", "threads", "dtype"),
        "results": [row.values() for row in rows],
    }


def _rows(options: HandoverBenchmark, subject: Subject) -> list[_Row]:
    checkpoint = subject.checkpoint
    most = int(checkpoint.config.get_text_config().max_position_embeddings)
    if max(options.history) + 2 * _USUAL_STEPS > most:
        raise UsageError(f"the model holds {most} tokens, so that --history has to be shorter than that")
    generator = torch.Generator().manual_seed(0)
    whole = Stage.load(checkpoint, 0, checkpoint.num_blocks, dtype=options.dtype)
    rows = []
    for tokens in options.history:
        length = min(tokens + _MOST_STEPS, most)
        hidden = torch.randn(1, length, checkpoint.hidden_size, generator=generator)
        wanted = whole.forward(hidden, whole.new_cache(0, checkpoint.num_blocks))
        rows.append(_Row(tokens, hidden, wanted))
    return rows


def _moved(swarm: LocalSwarm, model: SwarmModelForCausalLM, row: _Row, dtype: str) -> _Move:
    """Have the server of a new session stop, and time the step in which the session moves."""
    model.connection.call(model.connection.client.known.refresh)
    known, usual = len(model.events), []
    stopping: threading.Thread | None = None
    with model.session(row.hidden.shape[1]) as session:
        session.step(row.hidden[:, : row.tokens])
        old = next(one for one in swarm.servers if one.peer_id == model.trace[-1].hops[0].peer_id)
        try:
            for at in range(row.tokens, row.hidden.shape[1]):
                began = time.perf_counter()
                output = session.step(row.hidden[:, at : at + 1])
                seconds = time.perf_counter() - began
                if any(isinstance(event, PeerReplaced) for event in model.events[known:]):
                    break
                usual.append(seconds)
                if len(usual) == _USUAL_STEPS:
                    stopping = threading.Thread(target=old.stop, args=(_DRAIN_S,), name="swarmkit-bench-stop")
                    stopping.start()
                elif stopping is not None:
                    time.sleep(_PAUSE_S)
            else:
                raise AssertionError("the session stayed at a server that was told to stop")
        finally:
            session.close()
            if stopping is not None:
                stopping.join()
    apart = float((output - row.wanted[:, at : at + 1]).abs().max() / row.wanted.abs().max())
    if dtype == "float32" and apart > _TOLERANCE:
        raise AssertionError(
            f"after its move the session's outputs differ from the local model's by {apart:g}"
        )
    brought = [event.nbytes for event in model.events[known:] if isinstance(event, KeysHandedOver)]
    swarm.servers.remove(old)
    swarm.add_server(old.blocks)
    return _Move(seconds - statistics.median(usual), sum(brought))
