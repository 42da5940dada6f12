"""What does each codec of hidden states cost and save?

Two parts, with float32 models on both ends:

* agreement: every link always in one codec, over the memory transport. The swarm answers questions (those
  held out from tiny-chat's training; for other models random prompts) and is compared with the local model:
  equal answers, tokens up to the first difference, and logits along the local model's own answer. Bytes per
  token are those of decode steps over all links: from the client, to it, and from server to server.
* speed: over narrow emulated links, taking turns; the last row allows all codecs, where they pay.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from swarmkit.bench.measure import (
    PATIENT,
    Generated,
    median_ratio,
    must_be_equal,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.options import Codecs
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.events import StepFinished
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local
from swarmkit.net.emulation.link_schedule import EmulatedLink
from swarmkit.settings import ClientSettings, LossyCodec, ServerSettings
from swarmkit.tinychat import held_out

CODECS: dict[str, tuple[LossyCodec, ...]] = {
    "none": (),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
    "int8": ("int8",),
}
WHERE_IT_PAYS = "where it pays"
_MOST_TOKENS = 64
_RANDOM_PROMPT_TOKENS = 24


def measure(options: Codecs, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Compare answers over fast links, then time others over slow ones; the first round is not counted."""
    torch.set_num_threads(options.threads)
    agreement = measure_agreement(subject, options.questions, options.stages, on_progress)
    speed = _measure_speed(
        subject,
        options,
        EmulatedLink(delay_s=options.round_trip_ms / 2e3, bandwidth=options.megabits * 1e6),
        on_progress,
    )
    return {
        **options.values("stages", "questions"),
        "round_trip_ms": options.round_trip_ms,
        "bandwidth": options.megabits * 1e6,
        **options.values("prompt_tokens", "tokens", "rounds", "threads"),
        "dtype": "float32",
        "agreement": agreement,
        "speed": speed,
    }


def settings_of(name: str) -> ClientSettings:
    """A client's settings for one row."""
    if name == WHERE_IT_PAYS:
        changes: dict[str, Any] = {"codecs": ("bfloat16", "float16", "int8"), "compress": "where it pays"}
    else:
        changes = {"codecs": CODECS[name], "compress": "always"}
    return PATIENT.replace(**changes, prefix_cache_bytes=0)


def wire_bytes(step: StepFinished) -> int:
    """Bytes of hidden states that a step sent over any link."""
    total = before = 0
    for hop in step.hops:
        total += (hop.sent_bytes or before) + hop.received_bytes
        before = hop.received_bytes  # which is also what it handed on, if it did
    return total


def common_share(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of the longer of two answers [tokens] before their first difference."""
    shorter = min(len(one), len(other))
    same = int((one[:shorter] == other[:shorter]).int().cumprod(0).sum())
    return same / max(len(one), len(other))


# agreement


def measure_agreement(
    subject: Subject, questions: int, stages: int, on_progress: Progress = quiet
) -> list[dict[str, Any]]:
    """A row for each codec."""
    prompts = _prompts(subject, questions)
    local = load_local(subject.checkpoint, dtype=torch.float32)
    right = [_answer(local, prompt) for prompt in prompts]
    logits = [_logits(local, prompt, answer) for prompt, answer in zip(prompts, right, strict=True)]
    rows: list[dict[str, Any]] = []
    with LocalSwarm(
        subject.checkpoint,
        num_stages=stages,
        transport="memory",
        dtype="float32",
        server_settings=ServerSettings().replace(prefix_cache="off"),
    ) as swarm:
        for number, name in enumerate(CODECS):
            on_progress(f"answering in {name}", number, len(CODECS))
            model = swarm.model(dtype="float32", settings=settings_of(name))
            found = [_answer(model, prompt) for prompt in prompts]
            steps = [step for step in model.trace if step.tokens == 1]
            apart = [
                float((_logits(model, prompt, answer) - wanted).abs().max())
                for prompt, answer, wanted in zip(prompts, right, logits, strict=True)
            ]
            model.close()
            pairs = list(zip(found, right, strict=True))
            rows.append(
                {
                    "codec": name,
                    "bytes_per_token": round(statistics.mean(map(wire_bytes, steps))),
                    "equal_answers": round(statistics.mean(torch.equal(*pair) for pair in pairs), 4),
                    "equal_tokens": round(statistics.mean(common_share(*pair) for pair in pairs), 4),
                    "max_logit_difference": float(f"{max(apart):.3g}"),
                }
            )
    plain = rows[0]["bytes_per_token"]
    return [row | {"ratio_of_bytes": round(row["bytes_per_token"] / plain, 4)} for row in rows]


def _prompts(subject: Subject, count: int) -> list[torch.Tensor]:
    """Token ids [1, tokens], the same in each run."""
    if subject.label != "tiny-chat":
        return [random_prompt(subject.vocab_size, _RANDOM_PROMPT_TOKENS, seed) for seed in range(count)]
    tokenizer: Any = subject.checkpoint.tokenizer()
    everything = held_out()
    asked = random.Random(0).sample(everything, min(count, len(everything)))
    return [
        tokenizer.apply_chat_template(
            question.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for question in asked
    ]


def _answer(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """The greedy answer [tokens] to a prompt [1, tokens]."""
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_MOST_TOKENS, do_sample=False
    )
    answer: torch.Tensor = out[0, prompt.shape[1] :]
    return answer


def _logits(model: Any, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The logits [tokens, vocabulary] at each token of an answer."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.cat([prompt, answer[None]], dim=1)).logits
    return logits[0, prompt.shape[1] - 1 : -1].float()


# speed


def _measure_speed(
    subject: Subject, options: Codecs, link: EmulatedLink, on_progress: Progress
) -> list[dict[str, Any]]:
    names = [*CODECS, WHERE_IT_PAYS]
    prompt = random_prompt(subject.vocab_size, options.prompt_tokens)
    wanted = timed_generate(
        load_local(subject.checkpoint, dtype=torch.float32), prompt, options.tokens
    ).tokens
    timed: dict[str, list[Generated]] = {name: [] for name in names}
    used: dict[str, list[str]] = {}
    on_progress("starting", 0, options.rounds + 1)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=options.stages,
        processes=True,
        threads=options.threads,
        dtype="float32",
        link=link,
        server_settings=ServerSettings().replace(prefix_cache="off"),
    ) as swarm:
        models = {name: swarm.model(dtype="float32", settings=settings_of(name)) for name in names}
        for number in range(options.rounds + 1):
            for name, model in models.items():
                one = timed_generate(model, prompt, options.tokens)
                if name == "none":
                    must_be_equal(wanted, one.tokens, "float32")
                if number:
                    timed[name].append(one)
            on_progress("decoded over narrow links", number + 1, options.rounds + 1)
        for name, model in models.items():
            used[name] = _codecs_of(model.trace[-1])
    return [_speed_row(name, timed[name], timed["none"], used[name]) for name in names]


def _codecs_of(step: StepFinished) -> list[str]:
    """In what the boundaries were crossed, from the client on."""
    return [step.hops[0].sent_codec, *(hop.received_codec for hop in step.hops)]


def _speed_row(
    name: str, rounds: Sequence[Generated], plain: Sequence[Generated], used: list[str]
) -> dict[str, Any]:
    rates, plain_rates = ([1e3 / each.ms_per_token for each in some] for some in (rounds, plain))
    first, plain_first = ([each.first_token_s for each in some] for some in (rounds, plain))
    return {
        "codec": name,
        "tokens_per_s": round(statistics.median(rates), 3),
        "ratio_to_none": round(median_ratio(rates, plain_rates), 3),
        "first_token_s": round(statistics.median(first), 3),
        "first_token_ratio_to_none": round(median_ratio(first, plain_first), 3),
        "boundaries": used,
    }
