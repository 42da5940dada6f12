"""How many bytes blocks take, how many fit into a machine, and how many machines a whole model needs.

All of it is computed from the config; only what quantised weights take is read from the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig

from swarmkit.models.architecture.anatomy import block_numel, block_skeletons
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.device import ensure_device
from swarmkit.models.kv.measure import measure_block_cache
from swarmkit.models.kv.state_history import MARKS
from swarmkit.models.quantization.precision import Precision

RUNTIME_BYTES = {"cpu": 512 * 2**20, "cuda": 1024 * 2**20, "mps": 512 * 2**20}
"""What the interpreter, torch and its kernels take beside weights, cache and activations.

On Linux, without a GPU, a server's private memory (`VmData`) was 187 MiB with torch, 386 MiB with all that is
imported, and 470 MiB with threads, event loop and heap after one pass. Loading needs no term of its own. The
comparison of layouts takes 64 MiB before any weight is read, or three times the largest matrix, of which a
block has about three; and the source of the tensor that is converted takes room that the cache does not use
yet (see `swarmkit.models.execution.block_loading`).
"""

SESSION_TOKENS = 2048
"""Length that sessions are assumed to have, where a session takes room however long it is (recurrent blocks).
"""
_POSITION_BYTES = 8
"""A stage with recurrent blocks keeps the position of each token beside its inputs."""


@dataclass(frozen=True)
class CacheCost:
    """Bytes of cache to count for one block (the largest, if they differ).

    With these for each of its blocks, the bytes of any stage suffice.

    Attributes:
        token_bytes: for one token of one row.
        row_bytes: for one row however long it is: the states of recurrent blocks.
    """

    token_bytes: int
    row_bytes: int

    @property
    def row_tokens(self) -> int:
        """`row_bytes` in tokens: a row takes as much as so many tokens before it has any."""
        return -(-self.row_bytes // self.token_bytes) if self.token_bytes else 0


_COSTS: WeakKeyDictionary[Checkpoint, dict[torch.dtype, CacheCost]] = WeakKeyDictionary()
"""Costs that were found before: each takes running a block of each kind."""


def cache_cost(checkpoint: Checkpoint, dtype: torch.dtype) -> CacheCost:
    """What sessions cost in a model's blocks, with keys, values and states in `dtype`."""
    costs = _COSTS.setdefault(checkpoint, {})
    if dtype not in costs:
        size = measure_block_cache(checkpoint.config, dtype)
        token_bytes = size.values_per_token * dtype.itemsize
        if size.state_bytes_per_row:
            # Such a stage keeps its inputs as well, once. As recurrent blocks have no keys and values, it is
            # enough to count each block as the larger of both.
            token_bytes = max(token_bytes, checkpoint.hidden_size * dtype.itemsize + _POSITION_BYTES)
        costs[dtype] = CacheCost(token_bytes, size.state_bytes_per_row * (1 + MARKS))
    return costs[dtype]


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the weights of one block (the largest, if they differ) when loaded in `dtype`."""
    return block_numel(checkpoint.config) * dtype.itemsize


def weight_bytes(checkpoint: Checkpoint, precision: Precision) -> int:
    """Bytes of the weights of one block (the largest, if they differ) when loaded in a precision.

    Raises:
        ModelError: they are stored quantised, and the headers of the files cannot be fetched.
    """
    if precision.keeps_stored:
        return checkpoint.stored_block_bytes
    return max(precision.weight_bytes(block) for block in block_skeletons(checkpoint.config))


@dataclass(frozen=True)
class Plan:
    """What fits into the memory of one machine. Sizes are in bytes."""

    memory_bytes: int
    precision: str
    num_blocks: int
    """Blocks of the model."""
    block_bytes: int
    """Bytes of the weights of the largest block in the precision."""
    kv_bytes_per_block: int
    """Cache of `cache_tokens` tokens in one block, in sessions of `SESSION_TOKENS`, and static KV slots."""
    workspace_bytes: int
    """Bytes of the runtime, the activations of the largest step, and what training keeps."""
    cache_tokens: int

    @property
    def blocks_that_fit(self) -> int:
        """Number of blocks that fit; at most as many as the model has."""
        left = self.memory_bytes - self.workspace_bytes
        return max(0, min(self.num_blocks, left // (self.block_bytes + self.kv_bytes_per_block)))

    @property
    def machines_needed(self) -> int | None:
        """Number of such machines that one copy of the model takes; None if not one block fits."""
        fit = self.blocks_that_fit
        return -(-self.num_blocks // fit) if fit else None


def plan(
    config: PreTrainedConfig,
    kv_bytes_per_token_per_block: int,
    memory_bytes: int,
    precision: Precision,
    *,
    cache_tokens: int = 16_384,
    max_step_tokens: int = 4096,
    cuda_graph_slots: int = 4,
    cuda_graph_tokens: int = 2048,
    compiled_slots: int = 0,
    compiled_tokens: int = 0,
    training_bytes: int = 512 * 2**20,
    device: str = "cpu",
    row_tokens: int = 0,
    block_bytes: int | None = None,
) -> Plan:
    """Compare weights in the precision, cache for `cache_tokens` and workspace with `memory_bytes`.

    The skeletons of the blocks are built on the meta device: nothing is downloaded or allocated.

    Args:
        kv_bytes_per_token_per_block: in the precision's dtype, from `cache_cost`.
        max_step_tokens: batch x tokens of the largest step a server takes.
        cuda_graph_slots: sessions whose single tokens run as CUDA graphs; 0 for none. Counted only where the
            device and the precision can do that.
        cuda_graph_tokens: length of each of their static KV slots.
        compiled_slots, compiled_tokens: the same of sessions whose single tokens run as compiled steps, which
            are counted on CPUs.
        training_bytes: bytes of activations that training may keep for backward passes.
        row_tokens: what a session's row takes besides its tokens, in tokens; from `cache_cost`.
        block_bytes: of the largest block's weights, where they are stored quantised.
    """
    if block_bytes is None:
        block_bytes = max(precision.weight_bytes(block) for block in block_skeletons(config))
    width = max(int(getattr(config, "intermediate_size", 0) or 0), 4 * config.hidden_size)
    # Of one block at a time: the inputs and outputs of attention and the two wide halves of the feed-forward.
    activations = max_step_tokens * (4 * config.hidden_size + 2 * width) * precision.dtype.itemsize
    kind = torch.device(device).type
    runtime = RUNTIME_BYTES.get(kind, RUNTIME_BYTES["cuda"])
    with_graphs = kind == "cuda" and precision.allows_cuda_graphs
    room_tokens = cache_tokens
    if with_graphs and cuda_graph_slots:
        room_tokens += (cuda_graph_slots + 1) * cuda_graph_tokens  # one slot is spare
    if kind == "cpu" and compiled_slots:
        room_tokens += (compiled_slots + 1) * compiled_tokens
    return Plan(
        memory_bytes=memory_bytes,
        precision=precision.name,
        num_blocks=config.num_hidden_layers,
        block_bytes=block_bytes,
        kv_bytes_per_block=kv_bytes_per_token_per_block
        * (room_tokens + row_tokens * -(-cache_tokens // SESSION_TOKENS)),
        workspace_bytes=activations + runtime + training_bytes,
        cache_tokens=cache_tokens,
    )


def plan_checkpoint(
    checkpoint: Checkpoint,
    memory_bytes: int,
    precision: Precision,
    *,
    cache_tokens: int = 16_384,
    max_step_tokens: int = 4096,
    cuda_graph_slots: int = 4,
    cuda_graph_tokens: int = 2048,
    compiled_slots: int = 0,
    compiled_tokens: int = 0,
    training_bytes: int = 512 * 2**20,
    device: str = "cpu",
) -> Plan:
    """`plan` for a checkpoint. If its weights are stored quantised, the headers of its files are read (from
    the Hub, only these).
    """
    cost = cache_cost(checkpoint, precision.dtype)
    return plan(
        checkpoint.config,
        cost.token_bytes,
        memory_bytes,
        precision,
        cache_tokens=cache_tokens,
        max_step_tokens=max_step_tokens,
        cuda_graph_slots=cuda_graph_slots,
        cuda_graph_tokens=cuda_graph_tokens,
        compiled_slots=compiled_slots,
        compiled_tokens=compiled_tokens,
        training_bytes=training_bytes,
        device=device,
        row_tokens=cost.row_tokens,
        block_bytes=checkpoint.stored_block_bytes if precision.keeps_stored else None,
    )


def device_memory_bytes(device: str) -> int:
    """Return the bytes that a server may plan with: the free memory of a CUDA device, what Metal recommends
    on a Mac, or the machine's available memory for a CPU.
    """
    kind = ensure_device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if kind == "mps":
        return int(torch.mps.recommended_max_memory())
    import psutil

    return int(psutil.virtual_memory().available)
