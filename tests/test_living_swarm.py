"""Twelve uneven servers, each a process that chooses its blocks and moves by itself, as users have them."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch

from swarmkit import SwarmModelForCausalLM
from swarmkit.local import fork_server
from swarmkit.local.server_process import ServerProcess
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net import portal
from swarmkit.net.connect import over_hivemind
from swarmkit.node.node import Node
from swarmkit.settings import ClientSettings, ServerSettings

from .cli.commands import start
from .client.answers import answer, prompt
from .models.tiny import make_checkpoint
from .waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BLOCKS = 24
MACHINES = [
    (12, 20.0), (10, 35.0), (8, 15.0), (8, 40.0), (6, 30.0), (6, 12.0),
    (5, 25.0), (4, 45.0), (4, 18.0), (3, 50.0), (3, 22.0), (2, 60.0),
]  # fmt: skip
"""Of each machine, how many blocks it holds, and the tokens per second that it computes through them."""
CLIENTS = 8
SETTLED_S = 240.0
SERVER = ServerSettings().replace(
    announce_period_s=2.0, record_lifetime_s=8.0, move_period_s=10.0, move_gain=0.02, drain_timeout_s=5.0
)
CLIENT = ClientSettings().replace(refresh_period_s=2.0, route_timeout_s=120.0, min_step_timeout_s=10.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", num_blocks=BLOCKS))


def weakest(spans: list[tuple[int, int]], rates: list[float]) -> float:
    """Tokens per second through the weakest block."""
    changes = [0.0] * (BLOCKS + 1)
    for (low, high), rate in zip(spans, rates, strict=True):
        changes[low] += rate
        changes[high] -= rate
    return min(list(accumulate(changes))[:BLOCKS])


def best_found(seconds: int = 300) -> float:
    """The best placement of the machines that a search finds: from random ones, one machine at a time."""
    chance, rates = random.Random(0), [rate for _, rate in MACHINES]
    best = 0.0
    for _ in range(seconds):
        spans = [(low := chance.randrange(BLOCKS - count + 1), low + count) for count, _ in MACHINES]
        present, improved = weakest(spans, rates), True
        while improved:
            improved = False
            for number, (count, _) in enumerate(MACHINES):
                for low in range(BLOCKS - count + 1):
                    other = [*spans[:number], (low, low + count), *spans[number + 1 :]]
                    if (found := weakest(other, rates)) > present:
                        spans, present, improved = other, found, True
        best = max(best, present)
    return best


@dataclass
class Living:
    """The swarm of one test."""

    checkpoint: Checkpoint
    servers: list[ServerProcess]
    node: Node

    @property
    def alive(self) -> list[tuple[ServerProcess, float]]:
        """Servers that run, with their speeds."""
        rates = [rate for _, rate in MACHINES]
        return [(server, rate) for server, rate in zip(self.servers, rates, strict=True) if server.alive]

    @property
    def weakest(self) -> float:
        spans = [(server.blocks, rate) for server, rate in self.alive]
        return weakest([span for span, _ in spans], [rate for _, rate in spans])

    def model(self) -> SwarmModelForCausalLM:
        return SwarmModelForCausalLM.from_pretrained(self.checkpoint, node=self.node, settings=CLIENT)


@pytest.fixture
def living(checkpoint: Checkpoint) -> Iterator[Living]:
    """All machines, started in random order a moment apart, without waiting for each other."""
    meeting_point = start("bootstrap", until="listening")
    with ExitStack() as owned:
        owned.callback(meeting_point.end_with, signal.SIGINT)
        forks = owned.enter_context(fork_server.shared())
        order = random.Random(4).sample(range(len(MACHINES)), len(MACHINES))
        made: dict[int, ServerProcess] = {}
        for number in order:
            count, rate = MACHINES[number]
            made[number] = ServerProcess(
                checkpoint.name,
                [meeting_point.address],
                None,
                num_blocks=count,
                public_name=f"server-{number}",
                settings=SERVER.replace(throughput=rate),
                fork_server=forks,
            )
            owned.callback(made[number].kill)
        for server in made.values():
            server.start()
        lease = owned.enter_context(portal.lease())
        node = Node(over_hivemind([meeting_point.address], client_mode=True))
        running, _ = lease.start_task(node.run)
        owned.callback(running.result)
        owned.callback(lease.call_soon, node.request_stop)
        yield Living(checkpoint, [made[number] for number in range(len(MACHINES))], node)


def test_uneven_servers_cover_the_model_nearly_as_well_as_a_search_would(living: Living) -> None:
    wanted = 0.9 * best_found()
    wait_until(lambda: living.weakest >= wanted, "the servers are placed well", within=SETTLED_S, every=0.5)


def test_killing_a_third_loses_no_session_and_blocks_find_servers_again(living: Living) -> None:
    wait_until(lambda: living.weakest > 0, "every block has a server", within=SETTLED_S, every=0.5)
    local = load_local(living.checkpoint)
    prompts = [prompt(4 + number, seed=number)[0] for number in range(CLIENTS)]
    wanted = [answer(local, ids, new_tokens=16).tolist() for ids in prompts]
    models = [living.model() for _ in prompts]
    over, all_run = threading.Event(), threading.Barrier(CLIENTS + 1, timeout=120)

    def talk(number: int) -> list[Any]:
        found = [answer(models[number], prompts[number], new_tokens=16).tolist()]
        all_run.wait()
        while not over.is_set():
            found.append(answer(models[number], prompts[number], new_tokens=16).tolist())
        found.append(answer(models[number], prompts[number], new_tokens=16).tolist())
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        talks = [pool.submit(talk, number) for number in range(CLIENTS)]
        try:
            all_run.wait()
            for number in (1, 3, 4, 9):
                living.servers[number].kill()
            wait_until(
                lambda: living.weakest > 0, "every block has a server again", within=SETTLED_S, every=0.5
            )
        finally:
            over.set()
        for number, talked in enumerate(talks):
            assert all(found == wanted[number] for found in talked.result(timeout=SETTLED_S))
    for model in models:
        model.close()
