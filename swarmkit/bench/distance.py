"""How near does decoding come to what a long way between the peers allows?

The bound is what a token would take if nothing but distance and the model's own work cost time. With S
servers in the chain, d seconds one way between any two peers, and c seconds of compute for a token (the
whole model on this machine, in the same run):

    chain    client → s1 → s2 → … → sS → client      1 / ((S + 1) · d + c)   tokens per second
    relayed  client → s1 → client → s2 → … → client  1 / (2 · S · d + c)

Both are reported, and measured in both ways: servers that hand their outputs on to each other, and everything
through the client. Bandwidth is not in the bounds, though the emulated links have one.

Speculation gives several tokens for one trip along the chain, so it can pass the bound. How many depends on
the text, so three are decoded:

    prompt_lookup                  after the model's own greedy text, as long as it takes until a random model
                                   repeats itself. Draft tokens are looked up.
    prompt_lookup_without_repeats  after a random prompt, and no three tokens may come twice in a row: single
                                   tokens come again, but what followed them seldom does, so that most of what
                                   is looked up is wrong.
    draft                          the random prompt again; the model's own first blocks draft.

`predictable` tells how much of an answer its own past gives away: the share of its tokens that came after the
same two tokens the last time.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swarmkit.bench.draft import load_first_blocks
from swarmkit.bench.measure import (
    PATIENT,
    Generated,
    median_ratio,
    must_be_equal,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.options import Distance
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.client.speculation.assistants import SpeculationCount
from swarmkit.client.speculation.window import MAX_DRAFT_TOKENS
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.emulation.link_emulator import LinkEmulator
from swarmkit.net.emulation.link_schedule import EmulatedLink

_PROMPT_TOKENS = 16
_PINGS = 200
_MOST_OWN_TOKENS, _OWN_TOKENS = 1024, 64
_REPEATING = 0.9
"""Predictable, as a share."""

SPECULATIVE = ("prompt_lookup", "prompt_lookup_without_repeats", "draft")
"""Names of the rows with speculation."""


def chain_bound(stages: int, one_way_s: float, compute_s: float) -> float:
    """Tokens per second if each server hands its output on to the next one."""
    return 1 / ((stages + 1) * one_way_s + compute_s)


def relayed_bound(stages: int, one_way_s: float, compute_s: float) -> float:
    """Tokens per second if every output goes through the client."""
    return 1 / (2 * stages * one_way_s + compute_s)


def measure(options: Distance, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Decode over emulated links: local, chain and relayed take turns; the first round is not counted.

    Returns: JSON. `chain` and `relayed` have `tokens_per_s`, `ratio_to_chain_bound` and
        `ratio_to_relayed_bound`. The rows with speculation are None if not asked for, and have besides:
        `ratio_to_plain`, how many times as fast as that text without speculation in the same round;
        `drafted`, `accepted` and `speculative_steps` of all rounds that count; `max_draft_tokens`;
        `prompt_tokens`; `predictable`. `local_ms_per_token` is what the bounds take for c.
    """
    torch.set_num_threads(options.threads)
    delay_s = options.round_trip_ms / 2e3
    local = load_local(subject.checkpoint, dtype=options.dtype)
    prompt = random_prompt(subject.vocab_size, _PROMPT_TOKENS)
    drafting = (
        load_first_blocks(subject.checkpoint, options.draft_blocks, dtype=options.dtype)
        if options.draft_blocks
        else None
    )
    here: list[Generated] = []
    chain: list[Generated] = []
    relayed: list[Generated] = []
    speculative: dict[str, _SpeculativeText] = {}
    if options.prompt_lookup:
        most = {"prompt_lookup_num_tokens": options.prompt_lookup}
        text = _own_text(local, prompt, room=options.tokens)
        speculative["prompt_lookup"] = _SpeculativeText(text, {}, most, options.prompt_lookup)
        speculative["prompt_lookup_without_repeats"] = _SpeculativeText(
            prompt, {"no_repeat_ngram_size": 3}, most, options.prompt_lookup
        )
    if drafting is not None:
        speculative["draft"] = _SpeculativeText(prompt, {}, {"assistant_model": drafting}, MAX_DRAFT_TOKENS)
    emulator_ms = measure_emulator_ms()
    on_progress("starting", 0, options.rounds + 1)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=options.stages,
        processes=True,
        threads=options.threads,
        dtype=options.dtype,
        link=EmulatedLink(delay_s=delay_s, bandwidth=options.megabits * 1e6),
    ) as swarm:
        pushing = swarm.model(dtype=options.dtype, settings=PATIENT)
        through_client = swarm.model(dtype=options.dtype, settings=PATIENT.replace(push=False))
        for number in range(options.rounds + 1):
            one = timed_generate(local, prompt, options.tokens)
            two = timed_generate(pushing, prompt, options.tokens)
            three = timed_generate(through_client, prompt, options.tokens)
            must_be_equal(one.tokens, two.tokens, options.dtype)
            must_be_equal(one.tokens, three.tokens, options.dtype)
            if number:
                here.append(one)
                chain.append(two)
                relayed.append(three)
            for each in speculative.values():
                each.decode(pushing, local, options.tokens, options.dtype, counts=bool(number))
            on_progress("decoded over a distance", number + 1, options.rounds + 1)
        carried = sum(_carried(swarm.link_of(server)) for server in swarm.servers)
    compute_s = statistics.median(each.ms_per_token for each in here) / 1e3
    bound = chain_bound(options.stages, delay_s, compute_s)
    bound_relayed = relayed_bound(options.stages, delay_s, compute_s)
    return {
        **options.values("stages"),
        "round_trip_ms": options.round_trip_ms,
        "bandwidth": options.megabits * 1e6,
        **options.values("tokens", "rounds", "threads", "dtype"),
        "emulator_ms": emulator_ms,
        "link_bytes": carried,
        "local_ms_per_token": round(compute_s * 1e3, 3),
        "bound_tokens_per_s": {"chain": round(bound, 3), "relayed": round(bound_relayed, 3)},
        "chain": _row(chain, bound, bound_relayed),
        "relayed": _row(relayed, bound, bound_relayed),
        **{
            name: speculative[name].row(bound, bound_relayed) if name in speculative else None
            for name in SPECULATIVE
        },
    }


@dataclass
class _SpeculativeText:
    """One text, decoded with draft tokens and without in turns."""

    prompt: torch.Tensor
    text_options: dict[str, Any]
    draft_options: dict[str, Any]
    most: int
    with_speculation: list[Generated] = field(default_factory=list)
    without: list[Generated] = field(default_factory=list)
    count: SpeculationCount = field(default_factory=SpeculationCount)

    def decode(self, model: Any, local: Any, tokens: int, dtype: str, *, counts: bool) -> None:
        """One round.

        Raises:
            AssertionError: the tokens are not the local model's, in float32.
        """
        options = self.text_options
        before = model.speculation
        fast = timed_generate(model, self.prompt, tokens, speculation="auto", **options, **self.draft_options)
        found = model.speculation.since(before)
        slow = timed_generate(model, self.prompt, tokens, speculation="off", **options)
        must_be_equal(slow.tokens, fast.tokens, dtype)
        must_be_equal(timed_generate(local, self.prompt, tokens, **options).tokens, fast.tokens, dtype)
        if counts:
            self.with_speculation.append(fast)
            self.without.append(slow)
            self.count = SpeculationCount(
                self.count.steps + found.steps,
                self.count.drafted + found.drafted,
                self.count.accepted + found.accepted,
            )

    def row(self, bound: float, bound_relayed: float) -> dict[str, float]:
        rates = [[each.tokens_per_s for each in side] for side in (self.with_speculation, self.without)]
        answer = self.with_speculation[-1].tokens[0].tolist()
        return _row(self.with_speculation, bound, bound_relayed) | {
            "ratio_to_plain": round(median_ratio(*rates), 3),
            "drafted": self.count.drafted,
            "accepted": self.count.accepted,
            "speculative_steps": self.count.steps,
            "max_draft_tokens": self.most,
            "prompt_tokens": self.prompt.shape[1],
            "predictable": round(predictable(answer, self.prompt.shape[1]), 3),
        }


def _own_text(local: Any, prompt: torch.Tensor, room: int) -> torch.Tensor:
    """A prompt and what the model itself says after it, until it repeats itself.

    Args:
        room: positions to leave for an answer.
    """
    text = prompt
    most = min(_MOST_OWN_TOKENS, local.config.get_text_config().max_position_embeddings - room)
    while text.shape[1] + _OWN_TOKENS <= most:
        start = text.shape[1]
        text = timed_generate(local, text, _OWN_TOKENS).tokens
        if predictable(text[0].tolist(), start) >= _REPEATING:
            break
    return text


def predictable(text: Sequence[int], start: int) -> float:
    """The share of tokens from `start` on that came after the same two tokens the last time."""
    followed: dict[tuple[int, int], int] = {}
    right = 0
    for place in range(2, len(text)):
        pair = (text[place - 2], text[place - 1])
        right += place >= start and followed.get(pair) == text[place]
        followed[pair] = text[place]
    return right / max(len(text) - start, 1)


def _row(rounds: list[Generated], bound: float, bound_relayed: float) -> dict[str, float]:
    rate = statistics.median(each.tokens_per_s for each in rounds)
    return {
        "tokens_per_s": round(rate, 3),
        "ratio_to_chain_bound": round(rate / bound, 3),
        "ratio_to_relayed_bound": round(rate / bound_relayed, 3),
    }


def _carried(link: LinkEmulator) -> int:
    return link.inbound_bytes + link.outbound_bytes


def measure_emulator_ms() -> float:
    """What a link without delay adds to a round trip of one byte over loopback, in milliseconds."""
    with socket.create_server(("127.0.0.1", 0)) as server, portal.lease() as lease:
        target = server.getsockname()[:2]
        link = lease.call(lambda: LinkEmulator.open(target, EmulatedLink()))
        try:
            straight = _ping_ms(server, target)
            over_link = _ping_ms(server, (link.host, link.port))
        finally:
            lease.call(link.close)
    return round(over_link - straight, 3)


def _ping_ms(server: socket.socket, address: tuple[str, int]) -> float:
    """The median round trip of one byte to a thread that sends it back."""
    with socket.create_connection(address) as near:
        far, _ = server.accept()
        echo = threading.Thread(target=_echo, args=(far,), name="swarmkit-bench-echo")
        echo.start()
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(_PINGS):
            began = time.perf_counter()
            near.sendall(b"x")
            near.recv(1)
            times.append(time.perf_counter() - began)
    echo.join()
    return statistics.median(times) * 1e3


def _echo(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(1):
            connection.sendall(data)
