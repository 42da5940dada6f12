"""How many blocks fit, and how many such machines a whole model needs: computed from the config alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from swarmkit.errors import UsageError
from swarmkit.models.architecture.anatomy import block_skeletons
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.quantization.precision import Precision

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_RUNTIME_BYTES = {"cpu": 512 * 2**20, "cuda": 1024 * 2**20, "mps": 512 * 2**20}
"""What the interpreter, torch and its kernels take beside weights, cache and activations."""


SESSION_TOKENS = 2048
"""How long a session is taken to be where one takes room however long it is: with recurrent blocks."""


@dataclass(frozen=True)
class Plan:
    """What fits into one machine's memory. Sizes in bytes."""

    memory_bytes: int
    precision: str
    num_blocks: int
    """Of the whole model."""
    block_bytes: int
    """Weights of the largest block in the precision."""
    kv_bytes_per_block: int
    """Cache of `cache_tokens` tokens in one block, in sessions of `SESSION_TOKENS`, and of recorded work."""
    workspace_bytes: int
    """The runtime, the activations of the largest step, and what training keeps."""
    cache_tokens: int

    @property
    def blocks_that_fit(self) -> int:
        """0 if not even one fits; never more than the model has."""
        left = self.memory_bytes - self.workspace_bytes
        return max(0, min(self.num_blocks, left // (self.block_bytes + self.kv_bytes_per_block)))

    @property
    def machines_needed(self) -> int | None:
        """Machines of this size for one copy of the whole model; None if a block does not fit."""
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
    cuda_graph_tokens: int = 10_240,
    training_bytes: int = 512 * 2**20,
    device: str = "cpu",
    row_tokens: int = 0,
    block_bytes: int | None = None,
) -> Plan:
    """Weights in the precision + cache for `cache_tokens` + workspace, against `memory_bytes`.

    The skeletons of the blocks are built on the meta device: nothing is downloaded, nothing allocated.

    Args:
        kv_bytes_per_token_per_block: in the precision's dtype, from `Checkpoint`.
        max_step_tokens: batch x tokens of the largest step a server takes.
        cuda_graph_tokens: for which an accelerator with recorded work has room besides; none on others.
        training_bytes: that training may keep for its way back.
        row_tokens: what a session's row takes besides its tokens, in tokens; from `Checkpoint`.
        block_bytes: of the largest block's weights, where they are stored quantised; from `Checkpoint`.
    """
    if block_bytes is None:
        block_bytes = max(precision.weight_bytes(block) for block in block_skeletons(config))
    width = max(int(getattr(config, "intermediate_size", 0) or 0), 4 * config.hidden_size)
    # Of one block at a time: the inputs and outputs of attention and the two wide halves of the feed-forward.
    activations = max_step_tokens * (4 * config.hidden_size + 2 * width) * precision.dtype.itemsize
    kind = torch.device(device).type
    runtime = _RUNTIME_BYTES.get(kind, _RUNTIME_BYTES["cuda"])
    room_tokens = cache_tokens + (cuda_graph_tokens if kind == "cuda" else 0)
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
    cuda_graph_tokens: int = 10_240,
    training_bytes: int = 512 * 2**20,
    device: str = "cpu",
) -> Plan:
    """`plan`, with what only the checkpoint can tell. If its weights are stored quantised, the headers of its
    files are read (from the Hub, only these).
    """
    return plan(
        checkpoint.config,
        checkpoint.kv_bytes_per_token_per_block(precision.dtype),
        memory_bytes,
        precision,
        cache_tokens=cache_tokens,
        max_step_tokens=max_step_tokens,
        cuda_graph_tokens=cuda_graph_tokens,
        training_bytes=training_bytes,
        device=device,
        row_tokens=checkpoint.row_tokens(precision.dtype),
        block_bytes=checkpoint.weight_bytes(precision) if precision.keeps_stored else None,
    )


def device_memory_bytes(device: str) -> int:
    """Memory that a server may plan with: free memory of a CUDA device, half of a Mac's, what is available of
    the machine's for a CPU.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if kind == "mps":
        return int(torch.mps.recommended_max_memory())
    import psutil

    return int(psutil.virtual_memory().available)


def parse_bytes(text: str) -> int:
    """Read a size as people write it: "24GiB", "24 GB", "512MiB".

    Raises:
        UsageError: not a size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?B?)\s*", text.upper())
    if not found or found[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write 24GiB, 24GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(count: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
