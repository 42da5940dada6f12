"""PEFT's own functions, and libraries that call them, take a model of a swarm as they take the local one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import swarmkit
from swarmkit import LocalSwarm
from swarmkit.errors import AdapterError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

from ...models.tuned import peft_model, randomise, saved_adapter
from ..test_gradients import assert_close

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 9, 33, 17, 4, 41, 8, 12]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": TARGETS, "r": 2, "task_type": "CAUSAL_LM", **options})


def test_pefts_get_peft_model_finds_the_remote_layers(checkpoint: Checkpoint, swarm: LocalSwarm) -> None:
    models = [peft.get_peft_model(model, lora()).eval() for model in (swarm.model(), load_local(checkpoint))]
    for model in models:
        randomise(model, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(models[0](IDS).logits, models[1](IDS).logits)


def test_all_linear_layers_can_be_asked_for(checkpoint: Checkpoint, swarm: LocalSwarm) -> None:
    found, wanted = (
        peft.get_peft_model(model, lora(target_modules="all-linear"))
        for model in (swarm.model(), load_local(checkpoint))
    )
    assert sorted(found.targeted_module_names) == sorted(wanted.targeted_module_names)


def test_pefts_from_pretrained_loads_an_adapter(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    found = peft.PeftModel.from_pretrained(swarm.model(), saved_adapter(tmp_path, checkpoint, TARGETS)).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, peft_model(checkpoint, TARGETS)(IDS).logits)


def test_a_model_that_peft_has_looked_at_still_gives_the_plain_tokens(
    checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    model = swarm.model()
    model.prepare_adapters()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), load_local(checkpoint).generate(IDS, **options))


def test_an_adapter_that_is_unloaded_leaves_the_plain_model(
    checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    model = peft.get_peft_model(swarm.model(), lora())
    randomise(model, seed=1)
    plain = model.unload()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, load_local(checkpoint)(IDS).logits)
    assert plain.remote_adapters.is_untouched


# kinds that work on embeddings

OUTSIDE: dict[str, Callable[[], Any]] = {
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[5, 9], task_type="CAUSAL_LM"),
    "CPT": lambda: peft.CPTConfig(
        cpt_token_ids=[5, 9, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], task_type="CAUSAL_LM"
    ),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("entry", ["peft", "swarmkit"])
def test_what_works_on_embeddings_has_the_local_logits_and_gradients(
    checkpoint: Checkpoint, swarm: LocalSwarm, kind: str, entry: str
) -> None:
    losses, gradients = [], []
    for model in (swarm.model(), load_local(checkpoint)):
        torch.manual_seed(4)
        makes = swarmkit.get_peft_model if entry == "swarmkit" and not losses else peft.get_peft_model
        tuned = makes(model, OUTSIDE[kind]())
        loss = tuned(IDS).logits.square().mean()  # the loss of CPT itself weighs labels by their place
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in tuned.parameters() if p.requires_grad and p.grad is not None])
    assert_close(losses[0], losses[1])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for found, wanted in zip(*gradients, strict=True):
        assert_close(found, wanted)


# what cannot work


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
            "IA3 changes what blocks compute",
        ),
        (lambda: lora(use_dora=True), "DoRA"),
        (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (
            lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            "keys and values that belong to no token",
        ),
    ],
    ids=["IA3", "DoRA", "PiSSA", "prefixes"],
)
def test_what_cannot_work_is_refused_when_the_model_is_called(
    swarm: LocalSwarm, config: Callable[[], Any], words: str
) -> None:
    model = peft.get_peft_model(swarm.model(), config()).eval()
    with pytest.raises(UsageError, match=words), torch.no_grad():
        model(IDS)


def test_a_prefix_is_refused_by_generate_instead_of_left_out(swarm: LocalSwarm) -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(swarm.model(), config).eval()
    with pytest.raises(AdapterError, match="keys and values that belong to no token"):
        model.generate(input_ids=IDS, max_new_tokens=2)
    with model.disable_adapter():
        assert model.generate(input_ids=IDS, max_new_tokens=2).shape == (1, IDS.shape[1] + 2)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(swarm: LocalSwarm, method: str) -> None:
    model = peft.get_peft_model(swarm.model(), lora())
    with pytest.raises(AdapterError, match="cannot be merged into remote blocks"):
        getattr(model, method)()


@pytest.mark.parametrize("act", ["forward", "generate"])
def test_another_adapter_for_each_row_is_refused_by_name(swarm: LocalSwarm, act: str) -> None:
    model = peft.get_peft_model(swarm.model(), lora(), adapter_name="one")
    model.add_adapter("two", lora())
    randomise(model, seed=1)
    model.eval()
    rows = IDS.repeat(2, 1)
    options: dict[str, Any] = {"max_new_tokens": 2} if act == "generate" else {}
    call = model.generate if act == "generate" else model
    with torch.no_grad():
        call(input_ids=rows, **options)
        with pytest.raises(AdapterError, match="adapter_names"):
            call(input_ids=rows, adapter_names=["one", "two"], **options)
