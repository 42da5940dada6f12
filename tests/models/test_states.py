"""What sessions of recurrent blocks take besides tokens is counted, and is enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kv.measure import measure_block_cache
from swarmkit.models.kv.state_history import MARKS
from swarmkit.models.plan import cache_cost, plan_checkpoint
from swarmkit.models.quantization.precision import Precision
from swarmkit.server.cache.kv_budget import KVBudget

from .tiny import make_checkpoint, tiny_config

RECURRENT_BLOCK, ATTENTION_BLOCK = 2, 1


@pytest.fixture(scope="module")
def opened(checkpoints: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(checkpoints, "qwen3_next"))


def test_a_state_is_counted_with_its_copies(opened: Checkpoint) -> None:
    stage = Stage.load(opened, RECURRENT_BLOCK, RECURRENT_BLOCK + 1)
    cache = stage.new_cache(RECURRENT_BLOCK, RECURRENT_BLOCK + 1)
    stage.forward(torch.zeros(1, 1, stage.hidden_size), cache)
    inputs = stage.hidden_size * 4 + 8
    assert cache_cost(opened, torch.float32).row_bytes == (cache.nbytes() - inputs) * (1 + MARKS)


def test_part_of_a_state_has_four_bytes_whatever_is_computed_in(opened: Checkpoint) -> None:
    half, full = (cache_cost(opened, dtype).row_bytes for dtype in (torch.bfloat16, torch.float32))
    assert full / 2 < half < full


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "deepseek_v3"])
def test_models_of_attention_alone_have_no_states(model_type: str) -> None:
    assert measure_block_cache(tiny_config(model_type), torch.float32).state_bytes_per_row == 0


@pytest.mark.parametrize("steps", [[40], [9, *[1] * 80], [30, 5, 1, 1, 5, 20, 1]])
@pytest.mark.parametrize("blocks", [(0, 5), (1, 4), (2, 3), (1, 2), (2, 4)])
def test_a_lease_is_never_smaller_than_what_its_session_holds(
    opened: Checkpoint, blocks: tuple[int, int], steps: list[int]
) -> None:
    stage = Stage.load(opened, 0, 5)
    cache = stage.new_cache(*blocks)
    budget = KVBudget(2**30)
    cost = cache_cost(opened, stage.dtype)
    budget.row_tokens = cost.row_tokens
    lease = budget.lease((blocks[1] - blocks[0]) * cost.token_bytes)
    spare = []
    for tokens in steps:
        lease.grow(2, cache.tokens + tokens)
        stage.forward(torch.zeros(2, tokens, stage.hidden_size), cache)
        spare.append(lease.nbytes - cache.nbytes())
    assert min(spare) >= 0


def test_states_take_room_in_a_plan(opened: Checkpoint) -> None:
    precision = Precision.parse("float32", opened.config)
    cost = cache_cost(opened, torch.float32)
    states = cost.row_tokens * cost.token_bytes
    assert states >= cost.row_bytes
    short, longer = (
        plan_checkpoint(opened, 2**40, precision, cache_tokens=tokens).kv_bytes_per_block
        for tokens in (2048, 2049)  # one session, and two
    )
    assert longer - short == states + cost.token_bytes
