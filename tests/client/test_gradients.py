"""Gradients through a swarm are those of the local model, whatever the path, and however servers fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarmkit import LocalSwarm
from swarmkit.client.blocks import Blocks
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.errors import NoRouteError, UsageError
from swarmkit.events import PeerLost
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import load_local
from swarmkit.node.server import Server
from swarmkit.server.training.work import GradientWork
from swarmkit.settings import ClientSettings

from ..models.tiny import VOCABULARY, make_checkpoint
from ..waiting import wait_until
from .recovery import STAGES, World, a_world

FAMILIES = [
    "llama",
    "gemma2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "bloom", "gpt2", "qwen3_next")),
]
ROWS, TOKENS = 6, 64
PADDING = {
    "no padding": [0] * ROWS,
    "padded on the left": [5, 0, 20, 1, 0, 2],
    "padded on the right": [-4, 0, -30, 0, -1, -2],
}


def batch(padding: str = "no padding", rows: int = ROWS, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, tokens]."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING[padding][:rows]):
        padded = slice(count) if count > 0 else slice(tokens + count, tokens)
        mask[row, padded] = 0
    return ids, mask


def loss_and_gradient(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of the usual loss, with respect to the embeddings."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, **options).loss
    loss.backward()
    assert embeddings.grad is not None
    return loss.detach(), embeddings.grad


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


Both = tuple[SwarmModelForCausalLM, PreTrainedModel]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp(request.param), request.param))
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        yield swarm.model(settings=ClientSettings().replace(min_step_timeout_s=60)), load_local(checkpoint)


@pytest.fixture(scope="module")
def world(tiny_llama: Checkpoint) -> Iterator[World]:
    with a_world(tiny_llama) as world:
        yield world


@pytest.fixture(scope="module")
def local(tiny_llama: Checkpoint) -> PreTrainedModel:
    return load_local(tiny_llama)


# equality


@pytest.mark.parametrize("padding", PADDING)
def test_gradients_equal_the_local_models(family: Both, padding: str) -> None:
    remote, local = family
    found, wanted = (loss_and_gradient(model, *batch(padding)) for model in (remote, local))
    assert_close(found[0], wanted[0])
    assert_close(found[1], wanted[1])
    assert remote.traffic.requests > 4  # it was cut into micro-batches


def test_hidden_states_of_every_block_equal_the_local_models(family: Both) -> None:
    ids, mask = batch("padded on the left")
    found, wanted = (m(ids, attention_mask=mask, output_hidden_states=True).hidden_states for m in family)
    assert len(found) == len(wanted) == 6
    for one, other in zip(found, wanted, strict=True):
        assert_close(one[mask.bool()], other[mask.bool()])


def test_gradients_flow_through_hidden_states(family: Both) -> None:
    def gradient(model: Any) -> Tensor:
        ids, mask = batch()
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        states = model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True).hidden_states
        loss = sum((number + 1) * state.square().mean() for number, state in enumerate(states))
        loss.backward()
        assert embeddings.grad is not None
        return embeddings.grad

    found, wanted = (gradient(model) for model in family)
    assert_close(found, wanted)


def test_a_models_own_use_of_a_cache_does_no_harm(world: World, local: PreTrainedModel) -> None:
    found = loss_and_gradient(world.model, *batch(), use_cache=True)
    assert_close(found[1], loss_and_gradient(local, *batch())[1])


def test_half_precision_stays_within_its_bound(tiny_llama: Checkpoint, local: PreTrainedModel) -> None:
    with LocalSwarm(tiny_llama, num_stages=2, transport="memory", dtype="bfloat16") as swarm:
        found = loss_and_gradient(swarm.model(), *batch())[1]
    wanted = loss_and_gradient(local, *batch())[1]
    # bfloat16 keeps 8 bits: each of 5 blocks there and back may add 2^-8 of what goes through it.
    assert (found - wanted).norm() <= 10 * 2**-8 * wanted.norm()


# slices and paths of one's own


def test_a_path_of_ones_own_is_differentiable(world: World, local: PreTrainedModel) -> None:
    between = nn.Linear(32, 32)

    def gradients(first: Callable[[Tensor], Any], second: Callable[[Tensor], Any]) -> list[Tensor]:
        states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = second(between(first(states)))
        return list(torch.autograd.grad(out.square().mean(), [states, *between.parameters()]))

    def here(low: int, high: int) -> Callable[[Tensor], Tensor]:
        def run(states: Tensor) -> Tensor:
            rotary = local.model.rotary_emb(states, torch.arange(states.shape[1])[None])
            mask = torch.full((states.shape[1],) * 2, -torch.inf).triu(1)[None, None]
            for layer in local.model.layers[low:high]:
                states = layer(states, attention_mask=mask, position_embeddings=rotary)
            return states

        return run

    blocks = world.model.blocks
    for found, wanted in zip(
        gradients(blocks[0:2], blocks[3:]), gradients(here(0, 2), here(3, 5)), strict=True
    ):
        assert_close(found, wanted)


def test_slices_chain_to_the_whole(world: World) -> None:
    blocks, states = world.model.blocks, torch.randn(2, 9, 32)
    whole, every = blocks(states, output_hidden_states=True)
    assert torch.equal(nn.Sequential(*blocks)(states), whole)
    assert torch.equal(blocks[2:4](blocks[:2](states)), every[3])
    assert len(blocks) == len(every) == 5


@pytest.mark.parametrize("which", [slice(3, 3), slice(4, 2), slice(0, 4, 2)])
def test_a_slice_of_nothing_or_with_gaps_is_refused(world: World, which: slice) -> None:
    with pytest.raises(UsageError, match=r"as in blocks\[3:7\]"):
        world.model.blocks[which]


def test_there_is_no_block_behind_the_last(world: World) -> None:
    with pytest.raises(IndexError, match="no block 5"):
        world.model.blocks[5]
    assert [block.start for block in world.model.blocks] == list(range(5))
    assert world.model.blocks[-1].start == 4


# what autograd may ask for


def test_a_graph_that_is_kept_can_be_used_again(world: World) -> None:
    states = torch.randn(2, 9, 32, requires_grad=True)
    out = world.model.blocks(states)
    first, second = (torch.autograd.grad(out.sum(), states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivatives_are_refused(world: World) -> None:
    states = torch.randn(2, 9, 32, requires_grad=True)
    with pytest.raises(UsageError, match="first derivatives only"):
        torch.autograd.grad(world.model.blocks(states).sum(), states, create_graph=True)


def test_inputs_that_were_changed_meanwhile_are_noticed(world: World) -> None:
    states = torch.randn(2, 9, 32, requires_grad=True)
    given = states * 1
    out = world.model.blocks(given)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(world: World, value: float) -> None:
    states = torch.randn(2, 9, 32, requires_grad=True)
    requests = world.model.traffic.requests
    out = world.model.blocks(states)
    with pytest.raises(UsageError, match="gradient that comes from the loss contains NaN"):
        (out.sum() * value).backward()
    assert world.model.traffic.requests == requests + 3  # none of them for the way back


@pytest.mark.parametrize(
    ("states", "options", "says"),
    [
        (torch.full((1, 2, 32), float("nan")), {}, "hidden states contain NaN"),
        (torch.zeros(2, 32), {}, r"\[batch, tokens, hidden\]"),
        (torch.zeros(1, 2, 31), {}, r"\[batch, tokens, 32\]"),
        (torch.zeros(1, 2, 32), {"attention_mask": torch.ones(1, 3)}, r"must be \[1, 2\]"),
        (torch.zeros(1, 2, 32), {"position_ids": torch.ones(2, 2)}, r"position ids must be \[1, 2\]"),
    ],
)
def test_what_cannot_be_run_is_refused_here(
    world: World, states: Tensor, options: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        world.model.blocks(states, **options)


def test_a_step_runs_each_block_forward_once(tiny_llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_and_blocks = [0]
    run = Stage.run_full_sequences

    def counted(stage: Stage, hidden: Tensor, start: int, stop: int, *rest: Any) -> Tensor:
        rows_and_blocks[0] += (stop - start) * hidden.shape[0]
        return run(stage, hidden, start, stop, *rest)

    monkeypatch.setattr(Stage, "run_full_sequences", counted)
    with a_world(tiny_llama, replicas=1) as world:
        loss_and_gradient(world.model, *batch())
    assert rows_and_blocks[0] == ROWS * tiny_llama.num_blocks


# servers that fail


class Watch:
    """Sees every request that servers work on; acts once, at the first slice of a chosen one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[int, str]] = []
        """First block and direction of each."""
        self.act: tuple[int, str, int, Callable[[], None]] | None = None
        original = GradientWork.advance

        def advance(work: GradientWork) -> None:
            if not work.done:
                self._see(work.request.start, "backward" if work.goes_back else "forward")
            original(work)

        monkeypatch.setattr(GradientWork, "advance", advance)

    def at(self, block: int, direction: str, number: int, act: Callable[[], None]) -> None:
        """Act when request number `number` of that block and direction begins."""
        self.act = (block, direction, number, act)

    def _see(self, block: int, direction: str) -> None:
        self.begun.append((block, direction))
        if self.act is not None and (*self.act[:2], self.act[2]) == (
            block,
            direction,
            self.begun.count((block, direction)),
        ):
            act, self.act = self.act[3], None
            act()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def working(world: World, stage: int) -> Server:
    """The server of a stage that works on a request at this moment."""
    servers = [server for server in world.swarm.servers if isinstance(server, Server)]
    return next(
        server
        for server in servers
        if server.blocks == STAGES[stage] and server.serving.gradients and server.serving.gradients.waiting
    )


def answered(world: World) -> int:
    """Requests that servers have answered."""
    services = [server.serving.gradients for server in world.swarm.servers if isinstance(server, Server)]
    return sum(service.requests for service in services if service is not None)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("stage", [1, *(pytest.param(other, marks=pytest.mark.slow) for other in (0, 2))])
def test_a_server_that_dies_is_replaced_and_only_its_part_is_done_again(
    tiny_llama: Checkpoint, watch: Watch, stage: int, direction: str
) -> None:
    with a_world(tiny_llama) as world:
        wanted = loss_and_gradient(world.model, *batch())
        parts = world.model.traffic.requests // 6
        before = answered(world)
        dead: list[str] = []

        def die() -> None:
            server = working(world, stage)
            dead.append(server.peer_id)
            world.on_loop(lambda: world.network.kill(server.peer_id))

        watch.begun.clear()
        watch.at(STAGES[stage][0], direction, 2, die)
        found = loss_and_gradient(world.model, *batch())
        assert torch.equal(found[1], wanted[1])
        assert world.lost() == dead
        # What the others had done was asked for once. The dead one may have counted one more request as
        # answered, whose answer was cut off.
        assert 6 * parts <= answered(world) - before <= 6 * parts + 1
        assert len(watch.begun) <= 6 * parts + 2


def test_other_boundaries_do_for_the_way_back(tiny_llama: Checkpoint, watch: Watch) -> None:
    with a_world(tiny_llama, replicas=1) as world:
        states = torch.randn(ROWS, TOKENS, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def die() -> None:
            server = working(world, 1)
            world.on_loop(lambda: world.network.kill(server.peer_id))

        out = world.model.blocks(states).square().sum()
        (wanted,) = torch.autograd.grad(out, states, retain_graph=True)
        world.add((0, 2), (2, 5))
        watch.begun.clear()
        watch.at(1, "backward", 1, die)
        (found,) = torch.autograd.grad(out, states)
        assert torch.equal(found, wanted)
        assert len(world.lost()) == 1


def test_a_server_that_hangs_is_replaced(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, min_step_timeout_s=0.5) as world:
        wanted = loss_and_gradient(world.model, *batch())
        hung = world.swarm.servers[1]
        world.hang(hung)  # type: ignore[arg-type]
        found = loss_and_gradient(world.model, *batch())
        assert torch.equal(found[1], wanted[1])
        assert hung.peer_id in world.lost()


def test_blocks_that_nobody_serves_are_named_and_a_newcomer_is_used(tiny_llama: Checkpoint) -> None:
    with a_world(tiny_llama, replicas=1, route_timeout_s=0.2) as world:
        wanted = loss_and_gradient(world.model, *batch())
        world.swarm.servers[1].kill()
        with pytest.raises(NoRouteError, match="1:3"):
            loss_and_gradient(world.model, *batch())
        world.add((1, 3))
        assert torch.equal(loss_and_gradient(world.model, *batch())[1], wanted[1])


def test_nothing_is_left_behind(world: World) -> None:
    loss_and_gradient(world.model, *batch())
    services = [server.serving.gradients for server in world.swarm.servers if isinstance(server, Server)]

    def idle() -> bool:
        return all(
            service is not None and not service.streams and not service.waiting for service in services
        )

    wait_until(idle, "all streams have ended")
    assert not world.events(PeerLost)
    assert isinstance(world.model.blocks, Blocks)
