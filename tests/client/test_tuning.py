"""PEFT and the Hugging Face Trainer on a model of a swarm do what they do on the local one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from swarmkit import LocalSwarm, SwarmModelForSequenceClassification
from swarmkit.errors import ModelError
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.net.transport.memory import MemoryNetwork

from ..models.tiny import VOCABULARY, make_checkpoint
from .test_gradients import assert_close

peft = pytest.importorskip("peft")

PROMPT_TOKENS = 4


@dataclass
class TunedSwarm:
    swarm: LocalSwarm
    checkpoint: Checkpoint

    def model(self) -> Any:
        return self.swarm.model()

    def classifier(self, **options: Any) -> SwarmModelForSequenceClassification:
        assert self.swarm.network is not None
        torch.manual_seed(0)
        return SwarmModelForSequenceClassification.from_pretrained(
            self.checkpoint, transport=over_memory(self.swarm.network), num_labels=3, **options
        )

    def local_classifier(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            self.checkpoint.name, num_labels=3
        )
        return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TunedSwarm]:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tuned"), "llama"))
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        yield TunedSwarm(swarm, checkpoint)


class Texts(Dataset[dict[str, Tensor]]):
    """Some random texts that are to be said again."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def batch() -> dict[str, Tensor]:
    """Four of them; the first is padded on the left."""
    texts = [Texts()[number] for number in range(4)]
    stacked = {key: torch.stack([text[key] for text in texts]) for key in texts[0]}
    stacked["attention_mask"][0, :3] = 0
    stacked["labels"] = stacked["labels"].masked_fill(stacked["attention_mask"] == 0, -100)
    return stacked


def with_prompts(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    return peft.get_peft_model(model, config)


def prompts(model: Any) -> Tensor:
    (parameter,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    assert parameter.shape[0] == PROMPT_TOKENS
    return parameter  # type: ignore[no-any-return]


def trained(model: Any, steps: int = 3) -> list[float]:
    """The losses of some steps in a loop of one's own."""
    optimizer = torch.optim.Adam([prompts(model)], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_prompt_tuning_has_the_local_models_loss_and_gradient(world: TunedSwarm) -> None:
    found, wanted = (with_prompts(model) for model in (world.model(), load_local(world.checkpoint)))
    losses = [model(**batch()).loss for model in (found, wanted)]
    for loss in losses:
        loss.backward()
    assert_close(losses[0], losses[1])
    assert_close(prompts(found).grad, prompts(wanted).grad)


def test_a_loop_of_ones_own_learns_what_it_learns_locally(world: TunedSwarm) -> None:
    found, wanted = (trained(with_prompts(m)) for m in (world.model(), load_local(world.checkpoint)))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[-1] < found[0]


def test_a_saved_adapter_is_plain_pefts_and_training_goes_on_from_it(
    world: TunedSwarm, tmp_path: Path
) -> None:
    model = with_prompts(world.model())
    trained(model)
    model.save_pretrained(tmp_path)

    local = peft.PeftModel.from_pretrained(load_local(world.checkpoint), tmp_path)
    again = with_prompts(world.model())
    again.load_adapter(tmp_path, "default", is_trainable=True)
    with torch.no_grad():
        wanted = model(**batch()).logits
        assert_close(local(**batch()).logits, wanted)
        assert_close(again(**batch()).logits, wanted)
    assert trained(again, 1)[0] == pytest.approx(trained(model, 1)[0], rel=1e-5)


def trainer(model: Any, folder: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return Trainer(model=model, args=arguments, train_dataset=Texts())


def test_the_trainer_trains_saves_and_resumes(world: TunedSwarm, tmp_path: Path) -> None:
    whole = with_prompts(world.model())
    trainer(whole, tmp_path / "whole", 4).train()
    local = with_prompts(load_local(world.checkpoint))
    trainer(local, tmp_path / "local", 4).train()
    resumed = with_prompts(world.model())
    trainer(resumed, tmp_path / "whole", 4).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    torch.testing.assert_close(prompts(whole), prompts(local), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prompts(resumed), prompts(whole), rtol=1e-3, atol=1e-4)


def test_prompts_help_to_generate(world: TunedSwarm) -> None:
    found, wanted = (with_prompts(model) for model in (world.model(), load_local(world.checkpoint)))
    ids = Texts()[0]["input_ids"][None, :5]
    tokens = [m.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for m in (found, wanted)]
    assert tokens[0].tolist() == tokens[1].tolist()


# classifiers


def labelled() -> dict[str, Tensor]:
    inputs = batch()
    inputs["input_ids"][1, 9:] = 0  # padding, which transformers finds by itself
    inputs["attention_mask"][1, 9:] = 0
    return {**inputs, "labels": torch.tensor([0, 2, 1, 2])}


def test_a_classifier_is_the_local_one_and_its_score_learns(world: TunedSwarm) -> None:
    found, wanted = world.classifier(), world.local_classifier()
    wanted.requires_grad_(False)
    wanted.score.load_state_dict(found.score.state_dict())
    wanted.score.requires_grad_(True)
    outputs = [model(**labelled()) for model in (found, wanted)]
    for output in outputs:
        output.loss.backward()
    assert_close(outputs[0].logits, outputs[1].logits)
    assert_close(found.score.weight.grad, wanted.score.weight.grad)
    assert [name for name, p in found.named_parameters() if p.requires_grad] == ["score.weight"]


def test_a_classifier_with_prompts_comes_back_from_where_it_was_saved(
    world: TunedSwarm, tmp_path: Path
) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=PROMPT_TOKENS)
    model = peft.get_peft_model(world.classifier(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(**labelled()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**labelled()).logits
        for base in (world.classifier(), world.local_classifier()):
            found = peft.PeftModel.from_pretrained(base, tmp_path)(**labelled()).logits
            assert_close(found, wanted)


def test_an_architecture_without_a_classifier_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "granite"))
    factory = over_memory(MemoryNetwork())
    with pytest.raises(ModelError, match="no model for sequence classification of the type 'granite'"):
        SwarmModelForSequenceClassification.from_pretrained(checkpoint, transport=factory)
