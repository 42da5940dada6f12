"""Deep prompts over a swarm: of all rows or of each, in training and in sessions, as on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swarmkit import LocalSwarm
from swarmkit.errors import SessionError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

BLOCKS, HIDDEN, TOKENS = 4, 32, 3
IDS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(2))
"""Enough tokens for two micro-batches or more."""
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> Any:
    return swarm.model()


@pytest.fixture
def local(checkpoint: Checkpoint) -> Any:
    return load_local(checkpoint)


def prompts(*rows: int, tokens: int = TOKENS, blocks: int = BLOCKS) -> Tensor:
    """`[blocks, *rows, tokens, hidden]`, large enough to change answers."""
    return torch.randn(blocks, *rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(4)) * 0.5


@contextmanager
def prompted(local: Any, values: Tensor) -> Iterator[None]:
    """The local model, whose blocks add prompts `[blocks, (rows,) tokens, hidden]` to whole sequences."""

    def hook(block: int) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> Any:
            tokens = values.shape[-2]
            return (torch.cat([args[0][:, :tokens] + values[block], args[0][:, tokens:]], dim=1), *args[1:])

        return add

    handles = [layer.register_forward_pre_hook(hook(n)) for n, layer in enumerate(local.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assert_close(found: Tensor | None, wanted: Tensor | None) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# training


@pytest.mark.parametrize("rows", [(), (4,)], ids=["one for all rows", "one for each row"])
@pytest.mark.parametrize("ids", [IDS, LONG], ids=["one micro-batch", "several"])
def test_gradients_reach_what_the_prompts_are_made_of(
    model: Any, local: Any, ids: Tensor, rows: tuple[int, ...]
) -> None:
    given = prompts(*rows)
    losses, gradients = [], []
    for one in (model, local):
        scale = nn.Parameter(torch.ones(HIDDEN))
        with model.block_prompts(given * scale) if one is model else prompted(local, given * scale):
            loss = one(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(scale.grad)
    assert_close(losses[0], losses[1])
    assert_close(gradients[0], gradients[1])


def test_the_gradient_of_each_rows_prompts_is_its_own(model: Any, local: Any) -> None:
    gradients = []
    for one in (model, local):
        given = prompts(4).requires_grad_()
        with model.block_prompts(given) if one is model else prompted(local, given):
            one(input_ids=LONG, labels=LONG, use_cache=False).loss.backward()
        gradients.append(given.grad)
    assert_close(gradients[0], gradients[1])


def test_prompts_of_each_row_and_an_adapter_have_gradients_together(swarm: LocalSwarm, local: Any) -> None:
    peft = pytest.importorskip("peft")
    gradients = []
    base: Any = swarm.model()
    for one in (base, local):
        torch.manual_seed(3)
        tuned = peft.get_peft_model(one, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        given = prompts(4).requires_grad_()
        with base.block_prompts(given) if one is base else prompted(local, given):
            tuned(input_ids=LONG, labels=LONG, use_cache=False).loss.backward()
        gradients.append([given.grad, *(p.grad for p in tuned.parameters() if p.requires_grad)])
    for found, wanted in zip(*gradients, strict=True):
        assert_close(found, wanted)


def test_some_blocks_take_prompts_of_their_own(model: Any, local: Any) -> None:
    states = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    given = prompts(2, blocks=2).requires_grad_()
    found = model.blocks[1:3](states, prompts=given)
    whole = torch.cat([torch.zeros(1, 2, TOKENS, HIDDEN), given, torch.zeros(1, 2, TOKENS, HIDDEN)])
    with prompted(local, whole):
        rotary = local.model.rotary_emb(states, torch.arange(6)[None])
        mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
        wanted = states
        for layer in local.model.layers[1:3]:
            wanted = layer(wanted, attention_mask=mask, position_embeddings=rotary)
    assert_close(found, wanted)
    assert_close(
        torch.autograd.grad(found.square().mean(), given)[0],
        torch.autograd.grad(wanted.square().mean(), given)[0],
    )


# sessions


@pytest.mark.parametrize("rows", [(), (4,)], ids=["one for all rows", "one for each row"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}])
def test_answers_are_the_local_models(
    model: Any, local: Any, rows: tuple[int, ...], options: dict[str, Any]
) -> None:
    with model.block_prompts(prompts(*rows)):
        found = model.generate(IDS, **GREEDY, **options)
    each = options.get("num_beams", 1)
    given = prompts(*rows)
    with prompted(local, given.repeat_interleave(each, dim=1) if rows else given):
        wanted = local.generate(IDS, **GREEDY, **options, use_cache=False)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, local.generate(IDS, **GREEDY, **options))


def test_beams_keep_their_prompts_while_these_are_longer_than_the_text(model: Any, local: Any) -> None:
    given = prompts(4, tokens=12)
    with model.block_prompts(given):
        found = model.generate(IDS, **GREEDY, num_beams=2)

    def padded(values: Tensor, length: int) -> Tensor:
        return values[:, :, :length].repeat_interleave(2, dim=1)

    handles = []
    for block, layer in enumerate(local.model.layers):

        def add(layer: nn.Module, args: tuple[Tensor, ...], block: int = block) -> Any:
            own = padded(given, min(12, args[0].shape[1]))[block]
            return (torch.cat([args[0][:, : own.shape[1]] + own, args[0][:, own.shape[1] :]], 1), *args[1:])

        handles.append(layer.register_forward_pre_hook(add))
    wanted = local.generate(IDS, **GREEDY, num_beams=2, use_cache=False)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, wanted)


def test_a_server_that_is_lost_after_rows_were_reordered_is_replaced_exactly(checkpoint: Checkpoint) -> None:
    states = torch.randn(3, 9, HIDDEN, generator=torch.Generator().manual_seed(2))
    order = [2, 0, 0]
    with LocalSwarm(checkpoint, num_stages=1, replicas=2, transport="memory") as swarm, torch.no_grad():
        blocks = swarm.model().blocks
        with blocks.session(max_length=16, prompts=prompts(3, tokens=6)) as session:
            session.step(states[:, :4])
            session.reorder(order)
            session.step(states[:, 4:5])
            used = session.route[0].split(" ")[0]
            next(server for server in swarm.servers if f"server-{swarm.servers.index(server)}" == used).kill()
            found = session.step(states[:, 5:])
        rows = torch.cat([states[order, :4], states[:, 4:]], dim=1)
        wanted = blocks(rows, prompts=prompts(3, tokens=6)[:, order])[:, 5:]
    assert_close(found, wanted)


def test_a_session_that_begins_anew_has_the_prompts_in_their_first_order(model: Any) -> None:
    states = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), model.blocks.session(max_length=16, prompts=prompts(3)) as session:
        wanted = session.step(states)
        session.reorder([2, 1, 0])
        session.step(states[:, :1])
        session.crop(0)
        assert_close(session.step(states), wanted)


def test_a_fork_keeps_each_rows_prompts(model: Any) -> None:
    states = torch.randn(3, 9, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), model.blocks.session(max_length=16, prompts=prompts(3, tokens=8)) as session:
        session.step(states[:, :4])
        session.reorder([1, 2, 0])
        fork = session.fork()
        fork.reorder([2, 1, 0])
        session.reorder([2, 1, 0])
        assert_close(fork.step(states[:, 4:]), session.step(states[:, 4:]))
        fork.close()


def test_a_session_does_not_go_on_without_its_prompts(model: Any) -> None:
    with model.session(max_length=64) as session, torch.no_grad():
        with model.block_prompts(prompts(4)):
            model.generate(IDS, session=session, **GREEDY)
        with pytest.raises(SessionError, match="open a new session"):
            session.step(torch.zeros(4, 1, HIDDEN))


# bad input


@pytest.mark.parametrize(
    "shape", [(3, TOKENS, HIDDEN), (BLOCKS, TOKENS, 31), (BLOCKS, HIDDEN), (BLOCKS, 0, 2, HIDDEN)]
)
def test_prompts_of_another_shape_are_refused(model: Any, shape: tuple[int, ...]) -> None:
    context = model.block_prompts(torch.zeros(shape))
    with pytest.raises(UsageError, match=r"deep prompts are \[4, tokens, 32\]"):
        context.__enter__()


@pytest.mark.parametrize("act", ["__call__", "generate"])
def test_prompts_for_another_number_of_rows_are_refused(model: Any, act: str) -> None:
    with model.block_prompts(prompts(3)), torch.no_grad(), pytest.raises(UsageError, match="for 3 rows"):
        getattr(model, act)(IDS)
