"""On an accelerator a swarm does what it does on a CPU, and its servers do not wait for the device.

Skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.models.execution.view import to_device
from swarmkit.models.head.head import load_local
from swarmkit.worker.node_supervisor import NODE_COMMAND
from swarmkit.worker.places import WorkerPlaces

from .client.answers import answer, at, prompt
from .models.tiny import make_checkpoint
from .waiting import wait_until
from .worker.worlds import RunningWorker, SaidMachine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")

DEVICE = "cuda"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return Checkpoint.open(make_checkpoint(folder, "llama", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def local(tiny: Checkpoint) -> Any:
    return load_local(tiny, dtype="float32", device=DEVICE)


@contextmanager
def swarm_of(checkpoint: Checkpoint, **options: Any) -> Iterator[LocalSwarm]:
    options = {"num_stages": 2, "transport": "memory", "dtype": "float32", "device": DEVICE, **options}
    with LocalSwarm(checkpoint, **options) as swarm:
        yield swarm


def there(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((7,), {}),
        ((7,), {"do_sample": True}),
        ((7,), {"num_beams": 3}),
        ((7, 3, 5), {}),
        ((7,), {"prompt_lookup_num_tokens": 3}),
    ],
    ids=["greedy", "sampling", "beams", "padded", "prompt lookup"],
)
def test_tokens_are_those_of_the_local_model(
    tiny: Checkpoint, local: Any, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    given = there(prompt(*lengths))
    with swarm_of(tiny) as swarm:
        tokens = answer(swarm.model(dtype="float32", device=DEVICE), *given, **options)
    assert tokens.tolist() == answer(local, *given, **options).tolist()


def test_the_client_may_be_on_a_cpu(tiny: Checkpoint, local: Any) -> None:
    with swarm_of(tiny) as swarm:
        tokens = answer(swarm.model(dtype="float32"), *prompt(7))
    assert tokens.tolist() == answer(local, *there(prompt(7))).tolist()


def test_a_server_that_is_lost_is_replaced(tiny: Checkpoint, local: Any) -> None:
    given = there(prompt(7))
    with swarm_of(tiny, replicas=2) as swarm:
        model = swarm.model(dtype="float32", device=DEVICE)

        def kill() -> None:
            peer = model.connection.client.trace[-1].hops[1].peer_id
            next(server for server in swarm.servers if server.peer_id == peer).kill()

        tokens = answer(model, *given, logits_processor=at({5: kill}))
    assert tokens.tolist() == answer(local, *given).tolist()


def test_several_clients_at_once(tiny: Checkpoint, local: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [there(prompt(5 + seed, seed=seed)) for seed in range(6)]
    with swarm_of(tiny) as swarm:
        models = [swarm.model(dtype="float32", device=DEVICE) for _ in prompts]
        with ThreadPoolExecutor(len(models)) as pool:
            found = list(pool.map(lambda pair: answer(pair[0], *pair[1]), zip(models, prompts, strict=True)))
    for tokens, given in zip(found, prompts, strict=True):
        assert tokens.tolist() == answer(local, *given).tolist()


def test_gradients_are_those_of_the_local_model(tiny: Checkpoint, local: Any) -> None:
    ids, mask = there(prompt(20, 13))

    def gradient(model: Any) -> Tensor:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeddings, attention_mask=mask, labels=ids).loss.backward()
        found: Tensor = embeddings.grad
        return found

    with swarm_of(tiny) as swarm:
        found = gradient(swarm.model(dtype="float32", device=DEVICE))
    assert torch.allclose(found, gradient(local), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "nf4"])
def test_every_precision_gives_the_local_models_tokens(dtype: str) -> None:
    checkpoint = Checkpoint.open("tiny-chat")
    ids = checkpoint.tokenizer()("What is the capital of France?", return_tensors="pt").input_ids.to(DEVICE)
    with swarm_of(checkpoint, dtype=dtype) as swarm:
        model = swarm.model(dtype="bfloat16", device=DEVICE)
        tokens = model.generate(ids, max_new_tokens=20, do_sample=False)
    local = load_local(checkpoint, dtype="float32", device=DEVICE)
    assert tokens.tolist() == local.generate(ids, max_new_tokens=20, do_sample=False).tolist()


@contextmanager
def nothing_waits() -> Iterator[None]:
    """What makes the host wait for the device fails in here."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_step_does_not_wait_for_the_device(
    tmp_path_factory: pytest.TempPathFactory, name: str, records: bool
) -> None:
    stage = Stage.load(
        Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp(name), name)),
        1,
        4,
        dtype="float32",
        device=DEVICE,
    )
    if records:
        stage.enable_cuda_graphs(3, 64)
    one, other = stage.new_cache(1, 4), stage.new_cache(1, 4)

    def steps() -> None:
        def run(*shares: tuple[Any, int]) -> None:
            parts = [StepPart(to_device(torch.zeros(1, n, 32), stage.device), cache) for cache, n in shares]
            for result in stage.forward_many(parts):
                assert isinstance(result, Tensor), result

        run((one, 5))
        run((one, 1), (other, 3))
        run((one, 1), (other, 1))
        run((other, 1))

    steps()  # libraries start, records are made
    with nothing_waits():
        steps()


@pytest.mark.slow
def test_a_worker_keeps_to_its_share_of_the_gpus_memory_and_gives_it_back(tmp_path: Path) -> None:
    """In the node's own process, which is the only one that the driver gives a share."""
    share, index = 0.1, torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    machine = SaidMachine()
    worker = RunningWorker(WorkerPlaces.inside(tmp_path), machine, node_command=NODE_COMMAND)
    try:
        limits = {"gpu_memory_share": {"in_use": share, "away": share}}
        worker.serve({"model": "tiny-chat", "device": f"cuda:{index}"}, limits=limits)
        node = worker.wait_for("serving").node
        assert node is not None
        with SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=node.addresses) as model:
            model.generate(torch.arange(5, 25)[None], max_new_tokens=20)
        used = worker.wait_until(lambda status: status.node and status.node.gpu_bytes, "it tells")
        assert used.node is not None
        assert used.node.gpu_bytes <= share * total
        worker.client.pause()
        worker.wait_for("paused")
        wait_until(lambda: torch.cuda.mem_get_info(index)[0] >= free - 2**26, "all memory is back", within=3)
    finally:
        worker.close()
