"""Training what works inside remote blocks: gradients, steps and files are those of PEFT on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swarmkit
from swarmkit import LocalSwarm
from swarmkit.errors import AdapterError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

from ...models.quantise import with_bitsandbytes
from ...models.tiny import make_checkpoint
from ...models.tuned import peft_model, randomise, saved_adapter

pytest.importorskip("peft")

KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "llama": ("llama", ["q_proj", "v_proj", "down_proj"], {}),
    "conv1d": ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    "experts": ("mixtral", ["q_proj", "o_proj"], {"layers_to_transform": [0, 2]}),
}
IDS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def lora(targets: list[str], **changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **changes)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-5, msg=name)


def steps(model: nn.Module, count: int, between: Any = lambda step: None) -> list[float]:
    """Losses of a plain training loop."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(count):
        between(step)
        loss = model(**BATCH).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def some_slowly(kind: str) -> object:
    return pytest.param(kind, marks=pytest.mark.slow if kind == "experts" else ())


@pytest.mark.parametrize("kind", map(some_slowly, KINDS))
def test_gradients_of_an_adapter_are_those_of_peft(tmp_path: Path, kind: str) -> None:
    model_type, targets, changes = KINDS[kind]
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, model_type, num_blocks=3))
    reference = peft_model(checkpoint, targets, **changes)
    reference(**BATCH).loss.backward()
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        model = swarmkit.get_peft_model(swarm.model(), lora(targets, **changes))
        randomise(model)
        model(**BATCH).loss.backward()
    wanted = {name: p.grad for name, p in trained(reference).items()}
    assert min(float(grad.abs().max()) for grad in wanted.values()) > 1e-4
    assert_alike({name: p.grad for name, p in trained(model).items()}, wanted)  # type: ignore[misc]


def test_gradients_come_from_the_states_between_blocks_too(checkpoint: Checkpoint, swarm: LocalSwarm) -> None:
    targets = KINDS["llama"][1]
    reference = peft_model(checkpoint, targets)
    model = swarmkit.get_peft_model(swarm.model(), lora(targets))
    randomise(model)
    for one in (model, reference):
        states = one(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
        (states[1].square().mean() + states[3].square().mean()).backward()
    grads = {name: p.grad for name, p in trained(reference).items()}
    wanted = {name: torch.zeros_like(trained(model)[name]) if g is None else g for name, g in grads.items()}
    assert_alike({name: p.grad for name, p in trained(model).items()}, wanted)  # type: ignore[misc]
    assert sum(bool(grad.any()) for grad in wanted.values()) == 3 * len(targets) * 2


def test_steps_of_an_optimiser_and_what_is_saved_are_those_of_peft(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    from peft import PeftModel

    targets = KINDS["llama"][1]
    reference = peft_model(checkpoint, targets)
    model = swarmkit.get_peft_model(swarm.model(), lora(targets))
    randomise(model)
    assert steps(model, 3) == pytest.approx(steps(reference, 3), abs=1e-5)
    assert_alike(trained(model), trained(reference), atol=1e-4)

    # Into plain PEFT, and back to be trained on.
    model.save_pretrained(tmp_path / "mine")
    plain = PeftModel.from_pretrained(load_local(checkpoint), tmp_path / "mine").eval()
    with torch.no_grad():
        logits = model.eval()(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    resumed = swarmkit.load_adapter(swarm.model(), tmp_path / "mine", is_trainable=True)
    assert_alike(trained(resumed), trained(model), atol=0)
    again = PeftModel.from_pretrained(load_local(checkpoint), tmp_path / "mine", is_trainable=True)
    assert steps(resumed, 1) == pytest.approx(steps(again, 1), abs=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(resumed.eval()(IDS).logits, again.eval()(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_server_killed_in_training_changes_nothing(checkpoint: Checkpoint) -> None:
    targets = KINDS["llama"][1]
    reference = peft_model(checkpoint, targets)
    with LocalSwarm(checkpoint, num_stages=2, replicas=2, transport="memory") as swarm:
        model = swarmkit.get_peft_model(swarm.model(), lora(targets))
        randomise(model)

        def kill(step: int) -> None:
            if step == 2:
                swarm.servers[1].kill()

        losses = steps(model, 4, kill)
    assert losses == pytest.approx(steps(reference, 4), abs=1e-5)
    assert_alike(trained(model), trained(reference), atol=1e-4)


# ---------------------------------------------------------------------- deep prompts


def prompted(checkpoint: Checkpoint, values: Tensor) -> Any:
    """The local model with hooks that add prompts [blocks, P, hidden]."""
    local: Any = load_local(checkpoint)

    def hook(block: int) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> Any:
            tokens = values.shape[1]
            return (torch.cat([args[0][:, :tokens] + values[block], args[0][:, tokens:]], dim=1), *args[1:])

        return add

    for block, layer in enumerate(local.model.layers):
        layer.register_forward_pre_hook(hook(block))
    return local


def test_deep_prompts_are_trained_and_generate_as_on_this_machine(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    model: Any = swarm.model()
    prompts = swarmkit.DeepPrompts(model, 3, std=0.3)
    values = nn.Parameter(prompts.values.detach().clone())
    reference = prompted(checkpoint, values)
    reference(**BATCH).loss.backward()
    model(**BATCH).loss.backward()
    torch.testing.assert_close(prompts.values.grad, values.grad, atol=1e-5, rtol=1e-5)
    assert steps(model, 2) == pytest.approx(losses_of(reference, values), abs=1e-5)

    prompts.save_pretrained(tmp_path)
    other: Any = swarm.model()
    swarmkit.DeepPrompts.from_pretrained(other, tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    wanted = reference.generate(IDS[:1], **options, use_cache=False)
    assert torch.equal(other.generate(IDS[:1], **options), wanted)
    other.use_deep_prompts(None)
    plain: Any = load_local(checkpoint)
    assert torch.equal(other.generate(IDS[:1], **options), plain.generate(IDS[:1], **options))


def losses_of(reference: Any, values: nn.Parameter) -> list[float]:
    values.grad = None
    return steps(_With(reference, values), 2)


class _With(nn.Module):
    """A model whose only trained parameters are some prompts."""

    def __init__(self, model: Any, values: nn.Parameter) -> None:
        super().__init__()
        self.model, self.values = model, values

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


def test_prompts_for_the_first_block_and_for_each_block_and_an_adapter_train_together(
    swarm: LocalSwarm,
) -> None:
    from peft import PromptTuningConfig

    base: Any = swarm.model()
    tuning = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = swarmkit.get_peft_model(base, tuning)
    swarmkit.DeepPrompts(model, 3)
    losses = steps(model, 4)
    assert losses[-1] < losses[0]
    assert len(trained(model)) == 2


# ---------------------------------------------------------------------- beside the blocks


def test_a_classifier_and_its_adapter_are_trained_saved_and_loaded(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    from peft import LoraConfig

    def classifier() -> Any:
        return swarmkit.SwarmModelForSequenceClassification.from_pretrained(
            checkpoint, transport=swarm.client_transport(), num_labels=2
        )

    # LoRA in the blocks and on the embeddings, and the head as a whole.
    targets = ["q_proj", "v_proj", "embed_tokens"]
    model = swarmkit.get_peft_model(classifier(), LoraConfig(target_modules=targets, task_type="SEQ_CLS"))
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 1, 0])}
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(2):  # after one step B is not 0 any more, so that A has a gradient as well
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    assert [name for name, p in trained(model).items() if torch.equal(p, before[name])] == []
    model.save_pretrained(tmp_path)
    again = swarmkit.load_adapter(classifier(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.slow
def test_the_trainer_trains_an_adapter(tmp_path: Path, swarm: LocalSwarm) -> None:
    from transformers import Trainer, TrainingArguments

    model = swarmkit.get_peft_model(swarm.model(), lora(["q_proj", "v_proj"]))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "last"))
    again = swarmkit.load_adapter(swarm.model(), tmp_path / "last")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits)


# ---------------------------------------------------------------------- bad input


def test_training_what_cannot_be_trained_there_is_refused(
    tmp_path: Path, checkpoint: Checkpoint, swarm: LocalSwarm
) -> None:
    dropping = swarmkit.get_peft_model(swarm.model(), lora(["q_proj"], lora_dropout=0.1))
    with pytest.raises(AdapterError, match="lora_dropout=0"):
        dropping.train()(**BATCH)
    with torch.no_grad():
        dropping.eval()(**BATCH)
    thawed = swarmkit.get_peft_model(swarm.model(), lora(["q_proj"]))
    thawed.requires_grad_(True)
    with pytest.raises(AdapterError, match="servers'"):
        thawed(**BATCH)
    second = saved_adapter(tmp_path, checkpoint, ["q_proj"])
    model = swarmkit.load_adapter(swarm.model(), second, adapter_name="one")
    swarmkit.load_adapter(model, second, adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(AdapterError, match="one, two"):
        model(**BATCH)


def test_a_gradient_with_nan_is_not_sent_and_others_go_on(swarm: LocalSwarm) -> None:
    model = swarmkit.get_peft_model(swarm.model(), lora(["q_proj"]))
    with pytest.raises(UsageError, match="NaN"):
        (model(**BATCH).loss * float("nan")).backward()
    assert all(p.grad is None for p in trained(model).values())
    model(**BATCH).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("nf4", 0.04)])
def test_gradients_through_quantised_blocks_are_those_of_peft_on_them(
    tmp_path: Path, kind: str, tolerance: float
) -> None:
    """The same quantised weights, and here as there float32 otherwise. Where bitsandbytes packs NF4 weights
    for a CPU, it rounds their scales to bfloat16.
    """
    folder = make_checkpoint(tmp_path, "llama", num_blocks=3, hidden_size=64, intermediate_size=128)
    with_bitsandbytes(folder, kind)
    checkpoint = Checkpoint.open(folder)
    targets = KINDS["llama"][1]
    reference = peft_model(checkpoint, targets)
    # Without it bitsandbytes computes in bfloat16 what comes before the first adapter, on some processors.
    reference.enable_input_require_grads()
    reference(**BATCH).loss.backward()
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        model = swarmkit.get_peft_model(swarm.model(), lora(targets))
        randomise(model)
        model.generate(input_ids=IDS, max_new_tokens=2)  # for which bitsandbytes may pack weights anew
        model(**BATCH).loss.backward()
    for name, parameter in trained(reference).items():
        found, wanted = trained(model)[name].grad, parameter.grad
        assert found is not None
        assert wanted is not None
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.95), ("bfloat16", 0.99)])
def test_gradients_through_rounded_blocks_point_where_those_of_whole_ones_do(
    checkpoint: Checkpoint, precision: str, least: float
) -> None:
    targets = KINDS["llama"][1]
    reference = peft_model(checkpoint, targets)
    reference(**BATCH).loss.backward()
    with LocalSwarm(checkpoint, num_stages=2, transport="memory", dtype=precision) as swarm:
        model = swarmkit.get_peft_model(swarm.model(), lora(targets))
        randomise(model)
        model(**BATCH).loss.backward()
    found = torch.cat([p.grad.flatten() for p in trained(model).values() if p.grad is not None])
    wanted = torch.cat([p.grad.flatten() for p in trained(reference).values()])
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > least


@pytest.mark.slow
def test_gradients_through_nf4_blocks_are_those_through_their_rounded_weights(checkpoint: Checkpoint) -> None:
    from bitsandbytes import functional as bnb

    targets = KINDS["llama"][1]
    reference = peft_model(checkpoint, targets)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if ".layers." in name and weight.ndim == 2 and "lora_" not in name:
                packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
                weight.copy_(bnb.dequantize_4bit(packed, state))
    reference(**BATCH).loss.backward()
    with LocalSwarm(checkpoint, num_stages=2, transport="memory", dtype="nf4") as swarm:
        model = swarmkit.get_peft_model(swarm.model(), lora(targets))
        randomise(model)
        model(**BATCH).loss.backward()
    grads = {name: p.grad for name, p in trained(model).items()}
    assert_alike(grads, {name: p.grad for name, p in trained(reference).items()}, atol=1e-4)  # type: ignore[arg-type, misc]
