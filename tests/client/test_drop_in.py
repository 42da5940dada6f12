"""A model of a swarm takes the place of the architecture's own class; what it cannot do is refused."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, pipeline

import swarmkit
from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.errors import NoRouteError, UsageError
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.settings import ClientSettings

from ..models.tiny import make_checkpoint
from .test_tuning import Texts, batch


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("tiny-chat", num_stages=2, transport="memory") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> Any:
    return swarm.model()


@pytest.fixture(scope="module")
def local() -> Any:
    return load_local(Checkpoint.open("tiny-chat"))


# the class and its name


def test_the_class_bears_the_architectures_own_name(model: Any) -> None:
    assert type(model).__name__ == LlamaForCausalLM.__name__
    assert type(model).__module__ == LlamaForCausalLM.__module__
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, SwarmModelForCausalLM)
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_a_text_pipeline_takes_the_model_without_a_complaint(
    swarm: LocalSwarm, model: Any, local: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        found, wanted = (
            pipeline("text-generation", model=one, tokenizer=swarm.tokenizer())("Hello", **options)
            for one in (model, local)
        )
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert found == wanted
    assert "not supported" not in caplog.text


def test_label_smoothing_shifts_the_labels_as_it_does_locally(
    swarm: LocalSwarm, local: Any, tmp_path: Path
) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    losses = [
        Trainer(model=one, args=arguments, train_dataset=Texts()).compute_loss(one, batch())
        for one in (swarm.model(), local)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_the_model_is_named_as_it_was_asked_for(model: Any) -> None:
    assert model.config.name_or_path == "tiny-chat"


# seen as text


def test_a_model_shows_its_name_and_the_servers_of_its_blocks(swarm: LocalSwarm, model: Any) -> None:
    text = repr(model)
    assert text.startswith("LlamaForCausalLM(")
    assert "tiny-chat: 8 remote blocks; servers: server-0 [0:4], server-1 [4:8]\n" in text


def test_a_session_shows_its_length_and_its_route(model: Any) -> None:
    with model.session(max_length=32) as session:
        assert repr(session) == "<Session of tiny-chat: 0 of 32 tokens; route: none yet>"
        model.generate(torch.tensor([[5, 9, 33]]), max_new_tokens=2)
        assert "route: server-0 [0:4] -> server-1 [4:8]>" in repr(session)
    assert repr(session).endswith("closed>")


def test_a_swarm_and_a_server_show_their_blocks(swarm: LocalSwarm) -> None:
    assert repr(swarm) == "<LocalSwarm of tiny-chat, 8 blocks; server-0 [0:4], server-1 [4:8]>"
    assert repr(swarm.servers[0]).startswith("<Server of tiny-chat, blocks 0:4; at ")


# what cannot work says so

REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "save_pretrained": (lambda model: model.save_pretrained("there"), "adapter with save_pretrained"),
    "push_to_hub": (lambda model: model.push_to_hub("there"), "adapter with save_pretrained"),
    "set_attn_implementation": (lambda model: model.set_attn_implementation("eager"), "on the servers"),
    "pickle": (pickle.dumps, "cannot be copied or pickled"),
    "deepcopy": (copy.deepcopy, "cannot be copied or pickled"),
    "output_attentions": (
        lambda model: model(torch.tensor([[5]]), output_attentions=True),
        "output_attentions=True is not possible",
    ),
    "output_attentions of generate": (
        lambda model: model.generate(
            torch.tensor([[5]]), output_attentions=True, return_dict_in_generate=True, max_new_tokens=2
        ),
        "output_attentions=True is not possible",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_by_name(model: Any, what: str) -> None:
    act, words = REFUSED[what]
    with pytest.raises(UsageError, match=words):
        act(model)


def test_a_refused_setting_leaves_the_model_as_it_was(model: Any, local: Any) -> None:
    with pytest.raises(UsageError):
        model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 9, 33]])
    torch.testing.assert_close(model(ids).logits, local(ids).logits)


@pytest.mark.parametrize("name", ["attn_implementation", "device_map", "load_in_8bit", "frobnicate"])
def test_an_option_of_from_pretrained_that_has_no_meaning_is_refused(swarm: LocalSwarm, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot take {name}='auto'"):
        swarm.model(**{name: "auto"})


def test_the_trainer_does_not_write_a_checkpoint_without_blocks(swarm: LocalSwarm, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=swarm.model(), args=arguments, train_dataset=Texts())
    with pytest.raises(UsageError, match="save_strategy='no'"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


# torch.compile


def test_a_compiled_model_generates_what_the_local_one_does(swarm: LocalSwarm, local: Any) -> None:
    model = swarm.model()
    model.compile(backend="eager")
    ids = torch.tensor([[5, 9, 33]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), local.generate(ids, **options))


# messages


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "'gpu' is not a device; use cpu, cuda"), ("cuda", "torch finds no cuda device")],
)
def test_a_device_that_is_not_there_is_named(swarm: LocalSwarm, device: str, words: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=words):
        swarm.model(device=device)
    with pytest.raises(UsageError, match=words):
        swarmkit.Server("tiny-chat", device=device)


def test_peers_of_another_model_are_named(swarm: LocalSwarm, tmp_path: Path) -> None:
    assert swarm.network is not None
    other = make_checkpoint(tmp_path, "llama")
    hasty = ClientSettings().replace(route_timeout_s=0.1)
    model = SwarmModelForCausalLM.from_pretrained(other, transport=over_memory(swarm.network), settings=hasty)
    with (
        model,
        pytest.raises(NoRouteError, match=r"no server of this swarm has .*: its servers have tiny-chat"),
    ):
        model.generate(torch.tensor([[5, 9]]), max_new_tokens=2)


def test_a_swarm_that_was_not_started_says_so_at_once() -> None:
    with pytest.raises(UsageError, match="start the swarm first"):
        LocalSwarm("tiny-chat", num_stages=2, transport="memory").model()


@pytest.mark.parametrize("given", ["/ip4/192.0.2.7", ["/ip4/192.0.2.7"]], ids=["text", "a list"])
def test_one_address_is_not_taken_for_a_list_of_letters(given: Any) -> None:
    with pytest.raises(UsageError, match=r"'/ip4/192.0.2.7' is no peer's address"):
        SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=given)


# the name of the distribution


def test_the_other_project_of_that_name_is_recognised() -> None:
    """As pip leaves it: the other project's `__init__.py` among our files."""
    code = (
        "import sys, types; other = types.ModuleType('swarmkit')\n"
        f"other.__path__ = [{str(Path(swarmkit.__file__).parent)!r}]\n"
        "sys.modules['swarmkit'] = other\n"
        "import swarmkit.cli"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert "is another project's" in done.stderr
    assert "pip uninstall -y swarmkit" in done.stderr


def test_nothing_tells_people_to_install_the_other_project() -> None:
    root = Path(swarmkit.__file__).parents[1]
    texts = [root / "README.md", *root.glob("docs/*.md"), *root.glob("notebooks/*.ipynb")]
    texts += root.glob("swarmkit/**/*.py")
    wrong = re.compile(r"pip install[^\n]*\bswarmkit(?![-_./\w])(?!-llm)")
    assert [path.name for path in texts if wrong.search(path.read_text())] == []


@pytest.mark.parametrize(("loaded", "frozen"), [("json", True), ("triton", False)])
def test_commands_leave_garbage_to_the_interpreter_where_triton_would_call_it_leaked(
    loaded: str, frozen: bool
) -> None:
    code = (
        "import sys, types, gc, atexit; import swarmkit.cli as cli; from unittest import mock\n"
        f"sys.modules.setdefault({loaded!r}, types.ModuleType({loaded!r}))\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
        "sys.argv = ['swarmkit', '--version']\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split()[-1] == str(frozen)


def test_gradient_checkpointing_changes_no_gradient(swarm: LocalSwarm, local: Any) -> None:
    gradients = []
    for model in (swarm.model(), local):
        model.gradient_checkpointing_enable()
        embeddings = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=batch()["labels"], use_cache=False).loss.backward()
        gradients.append(embeddings.grad)
    local.gradient_checkpointing_disable()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


# which servers


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("replicas"), "llama")
    with LocalSwarm(checkpoint, num_stages=1, replicas=2, transport="memory") as swarm:
        yield swarm


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("setting", ["allowed_servers", "blocked_servers"])
def test_a_client_uses_only_the_servers_that_its_user_allows(
    replicas: LocalSwarm, setting: str, wanted: int
) -> None:
    named = replicas.servers[wanted if setting == "allowed_servers" else 1 - wanted].peer_id
    model = replicas.model(settings=ClientSettings().replace(**{setting: (named,)}))
    with model.session(max_length=16) as session:
        model.generate(torch.tensor([[5, 9, 33]]), max_new_tokens=2)
        assert session.route == [f"server-{wanted} [0:5]"]


def test_a_session_over_some_blocks_runs_those_alone(swarm: LocalSwarm, model: Any) -> None:
    states = torch.randn(1, 6, 256, generator=torch.Generator().manual_seed(3))
    with model.blocks[2:6].session(max_length=16) as session, torch.no_grad():
        found = torch.cat([session.step(states[:, :4]), session.step(states[:, 4:])], dim=1)
        assert session.route == ["server-0 [2:4]", "server-1 [4:6]"]
    torch.testing.assert_close(found, model.blocks[2:6](states), rtol=1e-4, atol=1e-4)


def test_generate_does_not_use_a_session_over_some_blocks(swarm: LocalSwarm, model: Any, local: Any) -> None:
    ids = torch.tensor([[5, 9, 33]])
    with model.blocks[2:6].session(max_length=16) as session:
        found = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert session.position == 0
    assert torch.equal(found, local.generate(ids, max_new_tokens=3, do_sample=False))


def test_generate_refuses_a_session_over_some_blocks(model: Any) -> None:
    session = model.blocks[2:6].session(max_length=16)
    with session, pytest.raises(UsageError, match=r"needs model.session"):
        model.generate(torch.tensor([[5, 9, 33]]), session=session)
