"""Many clients at once: servers run their steps together, and each gets the tokens that it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from swarmkit import LocalSwarm
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head import head
from swarmkit.models.head.head import load_local
from swarmkit.node.server import Server
from swarmkit.settings import ClientSettings, ServerSettings

from ..models.tiny import make_checkpoint
from ..waiting import wait_until
from .answers import answer, at, prompt

CLIENTS = 8
ARCHITECTURES = [
    "llama",
    pytest.param("mistral", marks=pytest.mark.slow),
    pytest.param("gemma2", marks=pytest.mark.slow),
    pytest.param("gpt_oss", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
    "falcon",
]
"""A plain one; windows; capped scores; sinks and experts; latents; one whose steps are run one by one."""


@dataclass
class SharedSwarm:
    """A model here, the same in a swarm of two stages, and eight clients of that."""

    swarm: LocalSwarm
    local: PreTrainedModel
    models: list[SwarmModelForCausalLM]

    @property
    def sessions(self) -> int:
        """Open sessions on all servers."""
        services = [server.serving.sessions for server in self.swarm.servers if isinstance(server, Server)]
        return sum(service.num_sessions for service in services if service is not None)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedSwarm]:
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    checkpoint = Checkpoint.open(folder)
    swarm = LocalSwarm(
        checkpoint,
        num_stages=2,
        transport="memory",
        server_settings=ServerSettings().replace(prefill_chunk_tokens=16),  # so that prompts are cut
        client_settings=ClientSettings().replace(min_step_timeout_s=60),
    )
    with swarm:
        yield SharedSwarm(swarm, load_local(checkpoint), [swarm.model() for _ in range(CLIENTS)])


def prompts() -> list[Tensor]:
    """Of 3 to 45 tokens."""
    return [prompt(3 + 6 * number, seed=number)[0] for number in range(CLIENTS)]


def test_each_client_gets_the_tokens_that_it_gets_alone(world: SharedSwarm) -> None:
    all_run = threading.Barrier(CLIENTS, timeout=60)

    def talk(model: SwarmModelForCausalLM, ids: Tensor) -> Tensor:
        all_run.wait()
        return answer(model, ids, new_tokens=20)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(talk, world.models, prompts()))
    wanted = [answer(world.local, ids, new_tokens=20) for ids in prompts()]
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in wanted]


def test_threads_of_one_model_get_the_tokens_that_they_get_alone(
    world: SharedSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "ways_together", lambda *shape: ())  # as if its output layer were a large one
    all_run = threading.Barrier(CLIENTS, timeout=60)

    def talk(ids: Tensor) -> Tensor:
        all_run.wait()
        return answer(world.models[0], ids, new_tokens=20)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(talk, prompts()))
    wanted = [answer(world.local, ids, new_tokens=20) for ids in prompts()]
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in wanted]


def test_clients_that_break_off_change_nothing_for_the_others(world: SharedSwarm) -> None:
    all_run = threading.Barrier(CLIENTS, timeout=60)

    def break_off() -> None:
        raise InterruptedError

    def talk(number: int) -> Tensor | None:
        model, ids = world.models[number], prompts()[number]
        all_run.wait()
        if number % 4:
            return answer(model, ids, new_tokens=20)  # type: ignore[no-any-return]
        for tokens in range(1, 5):
            with pytest.raises(InterruptedError):
                answer(model, ids, logits_processor=at({tokens: break_off}))
        return None

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(talk, range(CLIENTS)))
    for ids, tokens in zip(prompts(), found, strict=True):
        assert tokens is None or tokens.tolist() == answer(world.local, ids, new_tokens=20).tolist()
    wait_until(lambda: world.sessions == 0, "servers held no session")
