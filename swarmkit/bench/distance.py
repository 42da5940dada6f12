"""How near does decoding come to what a long way between the peers allows?

The bound is what a token would take if nothing but distance and the model's own work cost time. With S
servers in the chain, d seconds one way between any two peers, and c seconds of compute for a token (the
whole model on this machine, in the same run):

    chain    client → s1 → s2 → … → sS → client      1 / ((S + 1) · d + c)   tokens per second
    relayed  client → s1 → client → s2 → … → client  1 / (2 · S · d + c)

Both are reported, and measured in both ways: servers that hand their outputs on to each other, and everything
through the client. Bandwidth is not in the bounds, though the emulated links have one.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from typing import Any

import torch

from swarmkit.bench.measure import (
    PATIENT,
    Generated,
    Progress,
    must_be_equal,
    quiet,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.subject import Subject
from swarmkit.local import LocalSwarm
from swarmkit.models.head import load_local
from swarmkit.net import portal
from swarmkit.net.link_emulator import LinkEmulator
from swarmkit.net.link_schedule import Link

_PROMPT_TOKENS = 16
_PINGS = 200


def chain_bound(stages: int, one_way_s: float, compute_s: float) -> float:
    """Tokens per second if each server hands its output on to the next one."""
    return 1 / ((stages + 1) * one_way_s + compute_s)


def relayed_bound(stages: int, one_way_s: float, compute_s: float) -> float:
    """Tokens per second if every output goes through the client."""
    return 1 / (2 * stages * one_way_s + compute_s)


def bench_distance(
    subject: Subject,
    *,
    round_trip_s: float = 0.1,
    bandwidth: float = 100e6,
    stages: int = 3,
    tokens: int = 32,
    rounds: int = 3,
    threads: int = 1,
    dtype: str = "float32",
    prompt_lookup: int = 0,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Decode over emulated links: local, chain and relayed take turns; the first round is not counted.

    Args:
        round_trip_s: between any two peers.
        bandwidth: bit/s of each server's link, in each direction.
        prompt_lookup: if above 0, also decode with guesses of so many tokens, found in the text so far,
            after a prompt that repeats itself.
    """
    torch.set_num_threads(threads)
    local = load_local(subject.checkpoint, dtype=dtype)
    prompt = random_prompt(subject.vocab_size, _PROMPT_TOKENS)
    repetitive = prompt.repeat(1, 4)
    here: list[Generated] = []
    chain: list[Generated] = []
    relayed: list[Generated] = []
    guessed: list[Generated] = []
    emulator_ms = measure_emulator_ms()
    on_progress("starting", 0, rounds + 1)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=stages,
        processes=True,
        threads=threads,
        dtype=dtype,
        link=Link(delay_s=round_trip_s / 2, bandwidth=bandwidth),
    ) as swarm:
        pushing = swarm.model(dtype=dtype, settings=PATIENT)
        through_client = swarm.model(dtype=dtype, settings=PATIENT.model_copy(update={"push": False}))
        for number in range(rounds + 1):
            one = timed_generate(local, prompt, tokens)
            two = timed_generate(pushing, prompt, tokens)
            three = timed_generate(through_client, prompt, tokens)
            must_be_equal(one.tokens, two.tokens, dtype)
            must_be_equal(one.tokens, three.tokens, dtype)
            if number:
                here.append(one)
                chain.append(two)
                relayed.append(three)
            if prompt_lookup:
                four = timed_generate(pushing, repetitive, tokens, prompt_lookup_num_tokens=prompt_lookup)
                must_be_equal(timed_generate(local, repetitive, tokens).tokens, four.tokens, dtype)
                if number:
                    guessed.append(four)
            on_progress("decoded over a distance", number + 1, rounds + 1)
        carried = sum(_carried(swarm.link_of(server)) for server in swarm.servers)
    compute_s = statistics.median(each.ms_per_token for each in here) / 1e3
    bound = chain_bound(stages, round_trip_s / 2, compute_s)
    bound_relayed = relayed_bound(stages, round_trip_s / 2, compute_s)
    return {
        "model": subject.label,
        "stages": stages,
        "round_trip_ms": round(round_trip_s * 1e3, 3),
        "bandwidth": bandwidth,
        "tokens": tokens,
        "rounds": rounds,
        "threads": threads,
        "dtype": dtype,
        "emulator_ms": emulator_ms,
        "link_bytes": carried,
        "local_ms_per_token": round(compute_s * 1e3, 3),
        "bound_tokens_per_s": {"chain": round(bound, 3), "relayed": round(bound_relayed, 3)},
        "chain": _row(chain, bound, bound_relayed),
        "relayed": _row(relayed, bound, bound_relayed),
        "prompt_lookup": _row(guessed, bound, bound_relayed) | {"guesses": prompt_lookup}
        if guessed
        else None,
    }


def _row(rounds: list[Generated], bound: float, bound_relayed: float) -> dict[str, float]:
    rate = statistics.median(_tokens_per_s(each) for each in rounds)
    return {
        "tokens_per_s": round(rate, 3),
        "ratio_to_chain_bound": round(rate / bound, 3),
        "ratio_to_relayed_bound": round(rate / bound_relayed, 3),
    }


def _tokens_per_s(generated: Generated) -> float:
    """After the first token, over all of them: with guesses several come at once, and a median would be 0."""
    return (len(generated.stamps) - 2) / (generated.stamps[-1] - generated.stamps[1])


def _carried(link: LinkEmulator) -> int:
    return link.inbound_bytes + link.outbound_bytes


def measure_emulator_ms() -> float:
    """What a link without delay adds to a round trip of one byte over loopback, in milliseconds."""
    with socket.create_server(("127.0.0.1", 0)) as server, portal.lease() as lease:
        target = server.getsockname()[:2]
        link = lease.call(lambda: LinkEmulator.open(target, Link()))
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
