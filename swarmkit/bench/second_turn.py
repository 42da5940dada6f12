"""A chat's second turn begins with all that was said in the first: is that computed again?

Two clients ask the same servers for the same second turn. One has had the first turn there, so that the
servers hold its pages; the other is a stranger, with whom nothing is shared.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from swarmkit.bench.measure import (
    PATIENT,
    median_ratio,
    must_be_equal,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.options import SecondTurn
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm

_ANSWER_TOKENS = 8


def measure(options: SecondTurn, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """The second turn's first token with the first turn's pages, and without, in turns.

    Every round is a chat of its own. The first round is not counted.
    """
    torch.set_num_threads(options.threads)
    known: list[float] = []
    strange: list[float] = []
    equal = 0
    with LocalSwarm(
        subject.checkpoint,
        num_stages=options.stages,
        processes=True,
        threads=options.threads,
        dtype=options.dtype,
        client_settings=PATIENT,
    ) as swarm:
        one, other = swarm.model(dtype=options.dtype), swarm.model(dtype=options.dtype)
        for number in range(options.rounds + 1):
            first = random_prompt(
                subject.vocab_size, options.history_tokens - _ANSWER_TOKENS, seed=2 * number
            )
            said = timed_generate(one, first, _ANSWER_TOKENS).tokens
            question = random_prompt(subject.vocab_size, options.question_tokens, seed=2 * number + 1)
            second = torch.cat([said, question], dim=1)
            with_pages = timed_generate(one, second, 2)
            without = timed_generate(other, second, 2)
            same = must_be_equal(without.tokens, with_pages.tokens, options.dtype)
            if number:
                known.append(with_pages.first_token_s)
                strange.append(without.first_token_s)
                equal += same
            on_progress("chats", number + 1, options.rounds + 1)
    return {
        **options.values("stages", "history_tokens", "question_tokens", "rounds", "threads", "dtype"),
        "first_token_s": round(statistics.median(known), 4),
        "first_token_without_s": round(statistics.median(strange), 4),
        "times_faster": round(median_ratio(strange, known), 3),
        "equal_answers": equal,
    }
