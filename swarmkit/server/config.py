"""What one server is asked to do, and how many blocks of its model its machine has room for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from swarmkit.errors import MemoryLimitError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.device import ensure_device
from swarmkit.models.head.output_layer import output_layer_bytes
from swarmkit.models.plan import Plan, device_memory_bytes, plan_checkpoint
from swarmkit.models.quantization.precision import Precision
from swarmkit.net.registry.records import MAX_HOSTED_ADAPTERS
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.settings import ServerSettings
from swarmkit.sizes import format_bytes


@dataclass(frozen=True)
class FittingBlocks:
    """How many blocks a server holds, and bytes that it has left for the keys and values of sessions."""

    count: int
    cache_bytes: int


@dataclass(frozen=True)
class ServerConfig:
    """Which model one server serves, how much of it, and how."""

    checkpoint: Checkpoint
    blocks: tuple[int, int] | None = None
    """The blocks [a, b) to begin with; None = choose where the swarm needs them most."""
    num_blocks: int | Literal["auto"] | None = None
    """How many to choose; "auto" = as many as fit into memory; None = all of the model."""
    memory_bytes: int | None = None
    """Memory to plan with; what the device has free if not given."""
    device: str = "cpu"
    dtype: str | torch.dtype = "auto"
    public_name: str = ""
    adapters: tuple[str, ...] = ()
    """Folders or Hub repositories of LoRA adapters to host."""
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    settings: ServerSettings = field(default_factory=ServerSettings)

    def __post_init__(self) -> None:
        ensure_device(self.device)
        total = self.checkpoint.num_blocks
        if self.blocks is not None:
            self.check_blocks(self.blocks)
        if len(self.adapters) > MAX_HOSTED_ADAPTERS:
            raise UsageError(f"a server hosts up to {MAX_HOSTED_ADAPTERS} adapters, not {len(self.adapters)}")
        if isinstance(self.num_blocks, int) and not 1 <= self.num_blocks <= total:
            raise UsageError(
                f"this model has {total} blocks; a server can hold 1 to {total}, not {self.num_blocks}"
            )

    def check_blocks(self, blocks: tuple[int, int]) -> None:
        """Raise UsageError unless blocks [a, b) are inside the model."""
        (low, high), total = blocks, self.checkpoint.num_blocks
        if not 0 <= low < high <= total:
            raise UsageError(f"blocks {low}:{high} are not inside this model's 0:{total}")

    @property
    def precision(self) -> Precision:
        """What the blocks are computed in."""
        return Precision.parse(self.dtype, self.checkpoint.config, self.device)

    def fitting(self) -> FittingBlocks:
        """As many blocks as fit into memory beside the workspace and the least cache, and the room that is
        left for sessions then.

        Raises:
            MemoryLimitError: not one does.
        """
        memory = device_memory_bytes(self.device) if self.memory_bytes is None else self.memory_bytes
        memory -= self._head_bytes
        plan = self.plan(memory)
        count = plan.blocks_that_fit
        if not count:
            needed = plan.workspace_bytes + plan.block_bytes + plan.kv_bytes_per_block
            raise MemoryLimitError(
                f"not one block of {self.checkpoint.name} in {plan.precision} fits: it needs "
                f"{format_bytes(needed)}, there are {format_bytes(memory)}; "
                "choose a lower precision or less cache",
                needed - memory,
            )
        of_slots = plan.kv_bytes_per_block - self.plan(memory, with_slots=False).kv_bytes_per_block
        taken = plan.workspace_bytes + count * (plan.block_bytes + of_slots)
        return FittingBlocks(count, memory - taken)

    def fits_beside(self, held: tuple[int, int], more: tuple[int, int]) -> bool:
        """Whether blocks `more` can be loaded while blocks `held` are served; the cache is shared."""
        free = device_memory_bytes(self.device)
        plan = self.plan(free if self.memory_bytes is None else self.memory_bytes)
        if self.memory_bytes is not None:
            of_held = (held[1] - held[0]) * (plan.block_bytes + plan.kv_bytes_per_block)
            free = min(free, self.memory_bytes - self._head_bytes - plan.workspace_bytes - of_held)
        return (more[1] - more[0]) * plan.block_bytes <= free

    @property
    def _head_bytes(self) -> int:
        """What the output layer takes that the server computes for clients."""
        return output_layer_bytes(self.checkpoint) if self.settings.head.offer_head else 0

    def plan(self, memory_bytes: int, with_slots: bool = True) -> Plan:
        """How this server would use so much memory, with static KV slots or without."""
        settings, engine = self.settings, self.settings.engine
        return plan_checkpoint(
            self.checkpoint,
            memory_bytes,
            self.precision,
            cache_tokens=settings.node.cache_tokens,
            max_step_tokens=settings.requests.max_step_tokens,
            cuda_graph_slots=engine.cuda_graph_slots if with_slots else 0,
            cuda_graph_tokens=engine.cuda_graph_tokens,
            compiled_slots=engine.compile_slots if with_slots and engine.compile != "off" else 0,
            compiled_tokens=engine.compile_tokens,
            training_bytes=settings.limits.activation_cache_bytes,
            device=self.device,
        )
