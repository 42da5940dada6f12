"""What a lying server computed is not believed once other servers are used.

The liar serves other weights under the model's fingerprint: its outputs are well-formed, and wrong.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarmkit.events import OutputsDiffered
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.node.server import Server
from swarmkit.settings import ServerSettings

from .answers import answer, prompt
from .recovery import World, a_world, assert_same

LONG = prompt(100)[0]
OTHER = prompt(100, seed=5)[0]
NEW = 6
SHARED = ServerSettings().replace(prefix_cache="everyone")


@pytest.fixture(scope="module")
def false(tiny_llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Other weights that claim to be the model's."""
    folder = tmp_path_factory.mktemp("false") / "model"
    shutil.copytree(tiny_llama.name, folder)
    for path in folder.glob("*.safetensors"):
        weights = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    checkpoint.__dict__["manifest"] = tiny_llama.manifest
    return checkpoint


@pytest.fixture
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    """One honest server for each half of the blocks."""
    with a_world(tiny_llama, replicas=1, stages=2, server_settings=SHARED) as world:
        yield world


@pytest.fixture(scope="module")
def local(tiny_llama: Checkpoint) -> Any:
    return load_local(tiny_llama)


def add_liar(world: World, false: Checkpoint, blocks: tuple[int, int]) -> Server:
    """A server of `false` weights that the client uses now in the place of the honest one."""
    liar = world.swarm.add(
        lambda place: Server(false, blocks=blocks, transport=place.transport, settings=SHARED)
    )
    world.look()
    world.client.bans.failed(honest(world, blocks).peer_id)
    return liar


def honest(world: World, blocks: tuple[int, int]) -> Server:
    return next(server for server in world.swarm.servers if server.blocks == blocks)  # type: ignore[return-value]


def end(world: World, liar: Server) -> None:
    """The liar leaves, and the honest server of its blocks may be used again."""
    world.client.bans.worked(honest(world, liar.blocks).peer_id)
    liar.stop(0.0)
    world.look()


HALVES = pytest.mark.parametrize("blocks", [(0, 2), (2, 5)], ids=["first half", "second half"])


@HALVES
def test_honest_servers_answer_right_after_a_turn_through_a_liar(
    world: World, false: Checkpoint, local: Any, blocks: tuple[int, int]
) -> None:
    wanted = answer(local, LONG, new_tokens=NEW)
    with world.swarm.model() as other:  # so that the honest servers hold the pages of the prompt
        assert_same(answer(other, LONG, new_tokens=NEW), wanted)
    liar = add_liar(world, false, blocks)
    assert answer(world.model, LONG, new_tokens=NEW).tolist() != wanted.tolist()
    end(world, liar)
    for _ in range(3):
        assert_same(answer(world.model, LONG, new_tokens=NEW), wanted)


@HALVES
def test_a_session_goes_on_rightly_once_its_liar_was_replaced(
    world: World, false: Checkpoint, local: Any, blocks: tuple[int, int]
) -> None:
    liar = add_liar(world, false, blocks)
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=NEW)
        end(world, liar)
        more = torch.cat([said, OTHER[:, :5]], dim=1)
        found = answer(world.model, more, new_tokens=NEW)
    assert_same(found, answer(local, more, new_tokens=NEW))


def test_the_difference_between_a_liar_and_its_replacement_is_told(world: World, false: Checkpoint) -> None:
    liar = add_liar(world, false, (0, 2))
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=NEW)
        end(world, liar)
        answer(world.model, torch.cat([said, OTHER[:, :5]], dim=1), new_tokens=NEW)
    (event,) = world.events(OutputsDiffered)
    assert event.peer_ids == (liar.peer_id, honest(world, (0, 2)).peer_id)
    assert (event.start, event.stop, event.loser) == (0, 2, "")
    assert event.excess > 1


def test_what_servers_of_a_mixed_session_computed_is_not_remembered(world: World, false: Checkpoint) -> None:
    liar = add_liar(world, false, (0, 2))
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=NEW)
        end(world, liar)
        answer(world.model, torch.cat([said, OTHER[:, :5]], dim=1), new_tokens=NEW)
    answer(world.model, LONG, new_tokens=NEW)
    assert restored(world) == 0


def test_no_output_of_a_replaced_liar_is_remembered(world: World, false: Checkpoint, local: Any) -> None:
    liar = add_liar(world, false, (2, 5))
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=NEW)
        end(world, liar)
        answer(world.model, torch.cat([said, OTHER[:, :5]], dim=1), new_tokens=NEW)
    with torch.no_grad():
        logits, wanted = world.model(LONG).logits, local(LONG).logits
    assert restored(world) == 96
    assert torch.allclose(logits, wanted, atol=1e-4)


def test_a_replacement_that_computes_the_same_lets_the_stages_behind_it_be(world: World, local: Any) -> None:
    world.add((0, 2))
    with world.model.session():
        said = answer(world.model, LONG, new_tokens=NEW)
        world.in_use(0).kill()
        behind = world.in_use(1)
        more = torch.cat([said, OTHER[:, :5]], dim=1)
        assert_same(answer(world.model, more, new_tokens=NEW), answer(local, more, new_tokens=NEW))
        (step,) = [step for step in world.client.trace if step.recovered]
    assert world.events(OutputsDiffered) == []
    assert [hop.peer_id for hop in step.hops][-1] == behind.peer_id
    answer(world.model, LONG, new_tokens=NEW)
    assert restored(world) == 96  # the session is remembered with its new servers


def test_a_cleared_memory_has_the_next_session_send_everything(world: World) -> None:
    answer(world.model, LONG, new_tokens=NEW)
    world.model.clear_prefix_cache()
    answer(world.model, LONG, new_tokens=NEW)
    assert restored(world) == 0


def restored(world: World) -> int:
    """Tokens that the latest answer's first step did not send."""
    return next(step for step in reversed(world.client.trace) if step.tokens > 1).restored
