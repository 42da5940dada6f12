"""Adapters for tiny models, as PEFT makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swarmkit.models.adapters.adapter import Adapter, AdapterSpec, Fittings, Lora
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local


def peft_model(checkpoint: Checkpoint, targets: list[str] | str, seed: int = 0, **changes: Any) -> Any:
    """The whole model on this machine with random LoRA on it; B is not 0, as it would be before training."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **changes}
    )
    model = get_peft_model(load_local(checkpoint), config)
    randomise(model, seed)
    return model.eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give all LoRA tensors random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def saved_adapter(
    folder: Path, checkpoint: Checkpoint, targets: list[str] | str, seed: int = 0, **changes: Any
) -> Path:
    """A folder with a random adapter, as PEFT saves it."""
    path = folder / f"adapter-{seed}"
    peft_model(checkpoint, targets, seed, **changes).save_pretrained(path)
    return path


def random_adapter(
    fittings: Fittings,
    start: int,
    stop: int,
    modules: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj"),
    rank: int = 3,
    prompt_tokens: int = 0,
    seed: int = 0,
    prompt_rows: int = 0,
) -> Adapter:
    """An adapter of blocks [start, stop) with random values."""
    lora = tuple(Lora(block, module, rank, 0.7) for block in range(start, stop) for module in sorted(modules))
    spec = AdapterSpec(start, stop, lora, prompt_tokens, prompt_rows)
    generator = torch.Generator().manual_seed(seed)
    values: Tensor = torch.randn(fittings.numel(spec), generator=generator) * 0.2
    return Adapter(spec, values, fittings)
