"""PEFT with remote blocks: `get_peft_model` and `load_adapter`, and `DeepPrompts`, which PEFT has not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swarmkit.client.adapters.mixin import AdapterMixin
from swarmkit.client.adapters.peft_config import ensure_possible
from swarmkit.errors import AdapterError, UsageError
from swarmkit.models.adapters.adapter import MAX_PROMPT_TOKENS

PROMPTS_FILE = "deep_prompts.safetensors"
_FORMAT = "swarmkit deep prompts 1"


def get_peft_model(model: Any, config: Any, adapter_name: str = "default", **options: Any) -> Any:
    """`peft.get_peft_model` for a model whose blocks are remote; refuses at once what cannot work.

    PEFT's own function works too, and so does what calls it, such as trl's `peft_config=…`. What cannot work
    is refused then as soon as the model is called.

    LoRA may be anywhere, inside the remote blocks too: its tensors stay here, are trained here, and go to the
    servers that compute with them. Prompt tuning and whatever else works outside the blocks is PEFT's own.

    Example::

        model = swarmkit.get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=8))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    Args:
        config: PEFT's; for LoRA with `lora_dropout=0` if it is to be trained.
        options: for PEFT.

    Raises:
        UsageError: PEFT is not installed.
        AdapterError: the adapter is of a kind that cannot work in remote blocks.
    """
    peft = _peft()
    ensure_possible(config)
    swarm_model_of(model).prepare_adapters()
    return peft.get_peft_model(model, config, adapter_name=adapter_name, **options)


def load_adapter(
    model: Any, adapter: str | os.PathLike[str], *, is_trainable: bool = False, **options: Any
) -> Any:
    """`PeftModel.from_pretrained` for a model whose blocks are remote: an adapter from a folder or the Hub.

    Args:
        is_trainable: go on training it.
        options: for PEFT, such as `adapter_name`, `revision` and `token`.

    Returns: PEFT's model. If `model` is one already, the adapter is added to it and chosen.

    Raises:
        UsageError: PEFT is not installed.
        AdapterError: it cannot be read, is for another model, or cannot work in remote blocks.
    """
    peft = _peft()
    hub = {key: options[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in options}
    try:
        config = peft.PeftConfig.from_pretrained(os.fspath(adapter), **hub)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{adapter} is neither a folder nor a repository with an adapter: {error}"
        ) from error
    ensure_possible(config)
    swarm_model_of(model).prepare_adapters()
    try:
        if isinstance(model, peft.PeftModel):
            name = options.pop("adapter_name", Path(adapter).name)
            model.load_adapter(os.fspath(adapter), name, is_trainable=is_trainable, **options)
            model.set_adapter(name)
            return model
        return peft.PeftModel.from_pretrained(
            model, os.fspath(adapter), is_trainable=is_trainable, config=config, **options
        )
    except (RuntimeError, ValueError, KeyError) as error:  # PEFT's words for shapes and names that do not fit
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{adapter} does not fit; it may be for another model: {reason}") from error


class DeepPrompts(nn.Module):
    """Trainable vectors for every block, added to its inputs at the first positions of each sequence.

    The servers add them. They become part of the model: its optimiser trains them, `generate()` uses them.
    Together with PEFT's prompt tuning of as many virtual tokens this is deep prompt tuning: a prompt for the
    first block, and one for each block on top. Where rows are padded on the left, use it only so: the first
    positions are the virtual tokens' then.

    Example::

        config = PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM")
        model = swarmkit.get_peft_model(model, config)
        prompts = swarmkit.DeepPrompts(model, num_tokens=8)
        …                                                     # train
        prompts.save_pretrained("my-prompts")

    Args:
        model: one with remote blocks, or PEFT's around one. Make prompts after PEFT's model, which freezes
            all parameters that it finds.
        std: standard deviation of the first values; 0 begins with the model as it is.
    """

    values: nn.Parameter
    """`[blocks, num_tokens, hidden]`"""

    def __init__(self, model: Any, num_tokens: int, std: float = 0.0) -> None:
        super().__init__()
        if not 1 <= num_tokens <= MAX_PROMPT_TOKENS:
            raise AdapterError(f"deep prompts have 1 to {MAX_PROMPT_TOKENS} tokens, not {num_tokens}")
        owner = swarm_model_of(model)
        reference = owner.connection.client.model
        self._fingerprint = reference.fingerprint
        shape = reference.num_blocks, num_tokens, reference.hidden_size
        self.values = nn.Parameter(torch.randn(shape) * std if std else torch.zeros(shape))
        owner.use_deep_prompts(self, self.values)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write them to a folder, in safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        metadata = {"format": _FORMAT, "fingerprint": self._fingerprint}
        save_file({"values": self.values.detach().cpu()}, Path(folder) / PROMPTS_FILE, metadata)

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | os.PathLike[str]) -> DeepPrompts:
        """Have a model use prompts that were saved; they can be trained on.

        Raises:
            AdapterError: there are none, or they are for another model.
        """
        values = _read_prompts(Path(folder) / PROMPTS_FILE, swarm_model_of(model))
        prompts = cls(model, values.shape[1])
        with torch.no_grad():
            prompts.values.copy_(values)
        return prompts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """They act in the blocks of their model."""
        raise UsageError("deep prompts act in their model's blocks; call the model")


def _read_prompts(path: Path, owner: AdapterMixin) -> Tensor:
    reference = owner.connection.client.model
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or list(file.keys()) != ["values"]:
                raise AdapterError(f"{path} has no deep prompts of this version")
            if metadata.get("fingerprint") != reference.fingerprint:
                raise AdapterError(
                    f"{path} is for the model {metadata.get('fingerprint')}, not for {reference.name} "
                    f"({reference.fingerprint})"
                )
            values: Tensor = file.get_tensor("values")
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as deep prompts: {error}") from error
    blocks, _, hidden = values.shape if values.ndim == 3 else (0, 0, 0)
    if (blocks, hidden) != (reference.num_blocks, reference.hidden_size) or not values.is_floating_point():
        raise AdapterError(f"{path} has prompts of {list(values.shape)}, which do not fit {reference.name}")
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"{path} contains NaN or infinity")
    return values.float()


def swarm_model_of(model: Any) -> AdapterMixin:
    """The model with remote blocks that is `model`, or that PEFT has wrapped.

    Raises:
        UsageError: there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(module, "prepare_adapters"):
            return module  # type: ignore[return-value]
    raise UsageError(
        f"a {type(model).__name__} has no remote blocks; load it with "
        "swarmkit.SwarmModelForCausalLM.from_pretrained(…)"
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need PEFT: pip install peft") from error
    return peft
