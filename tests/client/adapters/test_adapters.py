"""Adapters over a swarm: what PEFT computes on this machine, servers compute, whoever of them is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swarmkit
from swarmkit import LocalSwarm
from swarmkit.errors import AdapterError, RemoteError, SessionError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.node.server import Server
from swarmkit.settings import ClientSettings, ServerSettings

from ...models.tiny import make_checkpoint
from ...models.tuned import peft_model, randomise, saved_adapter
from ...waiting import wait_until

pytest.importorskip("peft")

IDS = torch.tensor([[5, 9, 33, 17, 4, 41, 8, 12]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def loaded(swarm: LocalSwarm, folder: Path, **options: Any) -> Any:
    return swarmkit.load_adapter(swarm.model(), folder, **options).eval()


def stores(swarm: LocalSwarm) -> list[Any]:
    found = []
    for server in swarm.servers:
        assert isinstance(server, Server)
        assert server.serving.sessions is not None
        found.append(server.serving.sessions.adapters)
    return found


def let_go(store: Any) -> bool:
    """Whether the store is empty after it was told to make room."""
    store.shrink(None, 0)
    return len(store) == 0


# ---------------------------------------------------------------------- the model that PEFT sees


def test_shadows_take_no_memory_and_no_place_in_the_state_dict(swarm: LocalSwarm) -> None:
    from peft import LoraConfig

    plain = set(swarm.model().state_dict())
    model = swarmkit.get_peft_model(swarm.model(), LoraConfig(target_modules=TARGETS, r=2))
    keys = {key.replace("base_model.model.", "") for key in model.state_dict()}
    assert {key for key in keys if "lora_" not in key} == plain
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and "lora_" not in name]
    assert blocks
    assert all(p.untyped_storage().nbytes() <= 4 for p in blocks)
    assert model.get_nb_trainable_parameters()[0] == 4 * 2 * (32 + 32 + 32 + 16 + 48 + 32)


# ---------------------------------------------------------------------- inference


def test_an_adapter_generates_what_it_generates_in_peft(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    folder = saved_adapter(tmp_path, checkpoint, TARGETS)
    reference = peft_model(checkpoint, TARGETS)
    model = loaded(swarm, folder)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)
    wanted = reference.generate(IDS, **GREEDY)
    assert torch.equal(model.generate(input_ids=IDS, **GREEDY), wanted)
    plain = load_local(checkpoint).generate(IDS, **GREEDY)  # type: ignore[operator]
    assert not torch.equal(wanted, plain)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=IDS, **GREEDY), plain)


def test_clients_with_different_adapters_and_with_none_run_side_by_side(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    models: list[Any] = [loaded(swarm, saved_adapter(tmp_path, checkpoint, TARGETS, s)) for s in (1, 2)]
    models.append(swarm.model())
    references = [peft_model(checkpoint, TARGETS, 1), peft_model(checkpoint, TARGETS, 2)]
    references.append(load_local(checkpoint))
    wanted = [reference.generate(input_ids=IDS, **GREEDY) for reference in references]
    with ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(model.generate, input_ids=IDS, **GREEDY) for model in models * 2]
        found = [run.result() for run in runs]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted * 2, strict=True))


def test_a_server_lost_while_an_adapter_generates_is_replaced(tmp_path: Path, checkpoint: Checkpoint) -> None:
    wanted = peft_model(checkpoint, TARGETS).generate(IDS, **GREEDY)
    folder = saved_adapter(tmp_path, checkpoint, TARGETS)
    with LocalSwarm(checkpoint, num_stages=2, replicas=2, transport="memory") as swarm:
        model = loaded(swarm, folder)
        killed: list[str] = []

        def kill_one(ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] == IDS.shape[1] + 5 and not killed:
                killed.extend(model.base_model.model.trace[-1].hops[-1].peer_id for _ in range(1))
                next(server for server in swarm.servers if server.peer_id == killed[0]).kill()
            return scores

        assert torch.equal(model.generate(input_ids=IDS, logits_processor=[kill_one], **GREEDY), wanted)
        assert killed


def test_an_adapter_is_sent_to_each_server_once(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    model = loaded(swarm, saved_adapter(tmp_path, checkpoint, TARGETS, seed=7))
    sender = model.base_model.model.connection.client.adapters
    for _ in range(3):
        model.generate(input_ids=IDS, **GREEDY)
    assert sender.sent_bytes == 4 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_an_adapter_that_a_server_has_let_go_is_sent_again(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    model = loaded(swarm, saved_adapter(tmp_path, checkpoint, TARGETS, seed=8))
    sender = model.base_model.model.connection.client.adapters
    first = model.generate(input_ids=IDS, **GREEDY)
    with torch.no_grad():
        logits = model(IDS).logits
    once = sender.sent_bytes
    for repeat in (2, 3):
        for store in stores(swarm):
            wait_until(lambda: let_go(store), "sessions have ended and their adapters are gone")  # noqa: B023
        if repeat == 2:
            assert torch.equal(model.generate(input_ids=IDS, **GREEDY), first)
        else:
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, logits)
        assert sender.sent_bytes == repeat * once


def test_a_session_does_not_go_on_with_another_adapter(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    model = loaded(swarm, saved_adapter(tmp_path, checkpoint, TARGETS))
    base = model.base_model.model
    with base.session(max_length=64) as session, torch.no_grad():
        model.generate(input_ids=IDS, session=session, **GREEDY)
        longer = torch.cat([IDS, IDS], dim=1)
        randomise(model, seed=9)
        with pytest.raises(SessionError, match="open a new session"):
            model.generate(input_ids=longer, session=session, **GREEDY)


def test_kept_pages_of_one_adapter_are_not_found_with_another(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    ids = torch.randint(3, 60, (1, 70), generator=torch.Generator().manual_seed(3))
    model = loaded(swarm, saved_adapter(tmp_path, checkpoint, TARGETS))
    base = model.base_model.model
    answers = []
    with torch.no_grad():
        for adapted in (True, False, True):
            with base.session(max_length=80) as session:
                if adapted:
                    answers.append(session.step(base.get_input_embeddings()(ids)))
                else:
                    with model.disable_adapter():
                        answers.append(session.step(base.get_input_embeddings()(ids)))
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)
    torch.testing.assert_close(answers[0], answers[2])


# ---------------------------------------------------------------------- hosted adapters


def test_a_hosted_adapter_is_chosen_by_name(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = saved_adapter(tmp_path, checkpoint, TARGETS)
    wanted = peft_model(checkpoint, TARGETS).generate(IDS, **GREEDY)
    plain = load_local(checkpoint).generate(IDS, **GREEDY)  # type: ignore[operator]
    with LocalSwarm(checkpoint, num_stages=1, transport="memory") as swarm:
        swarm.add_server((0, 2), adapters=[folder])
        swarm.add_server((2, 4), adapters=[folder])
        model: Any = swarm.model()
        assert list(model.hosted_adapters().values()) == ["adapter-0"]
        with model.hosted_adapter("adapter-0"):
            with torch.no_grad():
                logits = model(IDS).logits[0, -1]
            assert int(logits.argmax()) == int(wanted[0, IDS.shape[1]])
            assert torch.equal(model.generate(IDS, **GREEDY), wanted)
        assert torch.equal(model.generate(IDS, **GREEDY), plain)
        with pytest.raises(UsageError, match="hosted are: adapter-0"), model.hosted_adapter("pirate"):
            pass


# ---------------------------------------------------------------------- bad input


def test_what_cannot_work_in_remote_blocks_is_refused_by_name(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    from peft import IA3Config, LoraConfig, PrefixTuningConfig

    refused = {
        "DoRA": LoraConfig(target_modules=TARGETS, use_dora=True),
        "bias": LoraConfig(target_modules=TARGETS, bias="all"),
        "init_lora_weights='pissa'": LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"),
        "IA3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    for named, config in refused.items():
        with pytest.raises(AdapterError, match=named):
            swarmkit.get_peft_model(swarm.model(), config)
    other = Checkpoint.open(make_checkpoint(tmp_path, "llama", num_blocks=4, seed=5, hidden_size=64))
    with pytest.raises(AdapterError, match="another model"):
        swarmkit.load_adapter(swarm.model(), saved_adapter(tmp_path, other, TARGETS))


def test_values_that_are_no_numbers_are_not_sent(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    model = loaded(swarm, saved_adapter(tmp_path, checkpoint, TARGETS))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        model.generate(input_ids=IDS, **GREEDY)


def test_an_adapter_over_the_servers_quota_is_refused_and_others_go_on(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    tight = ServerSettings().replace(client_adapter_bytes=4000)
    quick = ClientSettings().replace(route_timeout_s=5.0, ban_s=0.1)
    with LocalSwarm(
        checkpoint, num_stages=1, transport="memory", server_settings=tight, client_settings=quick
    ) as swarm:
        model = loaded(swarm, saved_adapter(tmp_path, checkpoint, TARGETS))
        with pytest.raises(RemoteError, match="one client may have") as caught:
            model.generate(input_ids=IDS, **GREEDY)
        assert caught.value.code == "over_quota"
        small = loaded(swarm, saved_adapter(tmp_path, checkpoint, ["q_proj"], seed=3, r=1))
        small.generate(input_ids=IDS, **GREEDY)
        assert [len(store) for store in stores(swarm)] == [1]
