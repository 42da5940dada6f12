"""Libraries that take a Hugging Face model give the same with a model of a swarm as with the local one.

`make test-all` installs them (the extra `libraries`); a test whose library is not there is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from swarmkit import LocalSwarm
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("tiny-chat", num_stages=2, transport="memory") as swarm:
        yield swarm


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def of_both(swarm: LocalSwarm, act: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What something gives with the model of the swarm, and with the local one, under the same seed."""
    found = []
    for model in (swarm.model(), load_local(Checkpoint.open("tiny-chat"))):
        torch.manual_seed(7)
        found.append(act(model))
    return found[0], found[1]


# trl


def trl_options(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        **others,
    }


def lora() -> Any:
    import peft

    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")


def trained(trainer: Any) -> list[float]:
    """The losses and gradient norms of a trl trainer."""
    trainer.train()
    return [step[key] for step in trainer.state.log_history for key in ("loss", "grad_norm") if key in step]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trl_trains_an_adapter_as_it_does_locally(swarm: LocalSwarm, tmp_path: Path, kind: str) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts: dict[str, list[dict[str, str]]] = {
        "SFT": [{"text": f"The fox said hello number {n} to the hen."} for n in range(8)],
        "DPO": [{"prompt": f"Hello {n}", "chosen": " friend", "rejected": " foe"} for n in range(8)],
        "GRPO": [{"prompt": f"Hello {n}"} for n in range(8)],
    }
    own: dict[str, dict[str, Any]] = {
        "SFT": {"max_length": 32},
        "DPO": {"max_length": 32},
        "GRPO": {"max_completion_length": 8, "num_generations": 2},
    }

    def run(model: Any) -> list[float]:
        reward = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(**trl_options(tmp_path, **own[kind])),
            train_dataset=Dataset.from_list(texts[kind]),
            processing_class=swarm.tokenizer(),
            peft_config=lora(),
            **(reward if kind == "GRPO" else {}),
        )
        return trained(trainer)

    found, wanted = of_both(swarm, run)
    assert len(wanted) == 4
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


# lm-eval


def test_lm_eval_scores_a_task_as_it_does_locally(swarm: LocalSwarm, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    questions = [
        {"question": f"What is {a} plus {b}?", "choices": [str(a + b), str(a + b + 1)], "gold": 0}
        for a in range(2, 5)
        for b in range(2, 5)
    ]
    data = tmp_path / "sums.json"
    data.write_text("\n".join(json.dumps(question) for question in questions))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }

    def run(model: Any) -> Any:
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=swarm.tokenizer(), batch_size=4), tasks=[task], bootstrap_iters=0
        )
        scores = [[answer[0][0] for answer in one["resps"]] for one in results["samples"]["sums"]]
        return results["results"]["sums"]["acc,none"], scores

    found, wanted = of_both(swarm, run)
    assert found[0] == wanted[0]
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


# constrained decoding


def test_outlines_keeps_to_a_pattern_as_it_does_locally(swarm: LocalSwarm) -> None:
    outlines = pytest.importorskip("outlines")
    found, wanted = of_both(
        swarm,
        lambda model: outlines.from_transformers(model, swarm.tokenizer())(
            "How many hens?", outlines.types.Regex(r"[0-9]{3} hens"), max_new_tokens=16, do_sample=False
        ),
    )
    assert found == wanted
    assert found.endswith("hens")


def test_xgrammar_keeps_to_a_schema_as_it_does_locally(swarm: LocalSwarm) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    tokenizer: Any = swarm.tokenizer()
    schema = {"type": "object", "properties": {"hens": {"type": "boolean"}}, "required": ["hens"]}
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)
    prompt = tokenizer("Are there hens?", return_tensors="pt")

    def run(model: Any) -> str:
        processor = xgrammar.contrib.hf.LogitsProcessor(compiled)
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False, logits_processor=[processor])
        return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))

    found, wanted = of_both(swarm, run)
    assert found == wanted
    assert isinstance(json.loads(found)["hens"], bool)


# langchain


def test_langchain_runs_a_pipeline_as_it_does_locally(swarm: LocalSwarm) -> None:
    langchain = pytest.importorskip("langchain_huggingface")

    def run(model: Any) -> str:
        one = pipeline(
            "text-generation",
            model=model,
            tokenizer=swarm.tokenizer(),
            max_new_tokens=12,
            do_sample=False,
            return_full_text=False,
        )
        return str(langchain.HuggingFacePipeline(pipeline=one).invoke("Tell me a story about a fox."))

    found, wanted = of_both(swarm, run)
    assert found == wanted
    assert found
