"""How many blocks fit into a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.plan import Plan, plan, plan_checkpoint
from swarmkit.models.quantization.precision import PRECISIONS, Precision, choices

from .quantise import with_bitsandbytes
from .tiny import make_checkpoint


def a_plan(**changes: int) -> Plan:
    sizes = {
        "memory_bytes": 1000,
        "num_blocks": 8,
        "block_bytes": 100,
        "kv_bytes_per_block": 50,
        "workspace_bytes": 100,
        "cache_tokens": 1,
    }
    return Plan(precision="float32", **(sizes | changes))


def test_blocks_and_their_cache_must_fit_beside_the_workspace() -> None:
    assert a_plan().blocks_that_fit == 6


def test_no_more_blocks_are_planned_than_the_model_has() -> None:
    assert a_plan(memory_bytes=10**6).blocks_that_fit == 8


def test_the_last_machine_may_be_half_empty() -> None:
    assert a_plan(memory_bytes=550).machines_needed == 3  # 3 + 3 + 2


def test_a_machine_that_is_too_small_is_no_use_in_any_number() -> None:
    assert a_plan(memory_bytes=200).machines_needed is None


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_planned_bytes_of_a_block_are_those_of_a_loaded_one(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama", num_blocks=2))
    precision = Precision.parse(name, checkpoint.config)

    planned = plan(checkpoint.config, 1, 2**40, precision).block_bytes

    stage = Stage.load(checkpoint, 0, 1, dtype=name)
    loaded = sum(p.nbytes for p in stage.base.layers.parameters())  # type: ignore[attr-defined, union-attr]
    assert planned == pytest.approx(loaded, abs=1)


def test_a_plan_of_quantised_weights_counts_their_own_bytes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", num_blocks=2, hidden_size=64, intermediate_size=128)
    with_bitsandbytes(folder, "nf4")
    checkpoint = Checkpoint.open(folder)

    (precision,) = choices(checkpoint.config)
    planned = plan_checkpoint(checkpoint, 2**40, precision)

    tensors = load_file(folder / "model.safetensors")
    stored = max(sum(tensors[key].nbytes for key in checkpoint.block_keys(b, b + 1)) for b in range(2))
    assert (planned.precision, planned.block_bytes) == ("nf4", stored)


def test_fewer_bits_take_less_room() -> None:
    checkpoint = Checkpoint.open("tiny-chat")

    sizes = [
        plan(checkpoint.config, 1, 2**40, Precision.parse(name, checkpoint.config)).block_bytes
        for name in ("float32", "bfloat16", "int8", "nf4")
    ]

    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def planned(device: str, precision: str = "float32", **parts: int) -> Plan:
    """What is planned for tiny-chat with a cache of 100 tokens, of 1000 bytes each."""
    config = Checkpoint.open("tiny-chat").config
    kept = Precision.parse(precision, config)
    return plan(config, 1000, 2**32, kept, device=device, cache_tokens=100, **parts)


def test_what_training_keeps_is_planned_for() -> None:
    assert planned("cpu").workspace_bytes - planned("cpu", training_bytes=0).workspace_bytes == 512 * 2**20


def test_static_slots_and_a_spare_one_are_planned_for() -> None:
    found = planned("cuda", cuda_graph_slots=4, cuda_graph_tokens=10)
    assert found.kv_bytes_per_block == (100 + 5 * 10) * 1000


@pytest.mark.parametrize(
    ("device", "precision", "slots"),
    [("cpu", "float32", 4), ("cuda", "float32", 0), ("cuda", "int8", 4)],
    ids=["on a CPU", "turned off", "in int8"],
)
def test_no_static_slots_are_planned_for_where_there_are_no_cuda_graphs(
    device: str, precision: str, slots: int
) -> None:
    found = planned(device, precision, cuda_graph_slots=slots, cuda_graph_tokens=10)
    assert found.kv_bytes_per_block == 100 * 1000


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 50), ("cuda", 0)])
def test_slots_of_compiled_steps_are_planned_for_on_a_cpu(device: str, tokens: int) -> None:
    found = planned(device, cuda_graph_slots=0, compiled_slots=4, compiled_tokens=10)
    assert found.kv_bytes_per_block == (100 + tokens) * 1000


def test_an_unknown_precision_names_the_known_ones() -> None:
    config = Checkpoint.open("tiny-chat").config

    with pytest.raises(ModelError, match="float32, bfloat16, float16, int8, nf4"):
        Precision.parse("int3", config)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_computes_close_to_float32(name: str) -> None:
    if name in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    checkpoint = Checkpoint.open("tiny-chat")
    hidden = torch.randn(1, 6, checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))
    exact = Stage.load(checkpoint, 0, 2, dtype="float32")
    stage = Stage.load(checkpoint, 0, 2, dtype=name)

    found = stage.forward(hidden.to(stage.dtype), stage.new_cache(0, 2)).float()

    expected = exact.forward(hidden, exact.new_cache(0, 2))
    allowed = {"float32": 0.0, "bfloat16": 0.02, "float16": 0.005, "int8": 0.03, "nf4": 0.15}[name]
    assert float((found - expected).norm() / expected.norm()) <= allowed
