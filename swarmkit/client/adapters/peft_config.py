"""Which of PEFT's configs remote blocks can have: checks of settings, before any tensor is looked at."""

from __future__ import annotations

from typing import Any

from swarmkit.errors import AdapterError
from swarmkit.models.adapters.files import check_config

OUTSIDE_BLOCKS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "TRAINABLE_TOKENS")
"""Kinds of PEFT's adapters that work on embeddings, which are on this machine."""

PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of PEFT's `init_lora_weights` for which no weights of the blocks are needed."""

NO_PREFIXES = (
    "PREFIX_TUNING gives the blocks keys and values that belong to no token, and servers compute keys and "
    "values of tokens only; use swarmkit.DeepPrompts, which gives every block a prompt"
)


def ensure_possible(config: Any) -> None:
    """Raise AdapterError unless an adapter works on this machine's part, or is LoRA that servers can have."""
    kind = config.peft_type.value
    if kind == "LORA":
        ensure_plain(config)
    elif kind == "PREFIX_TUNING":
        raise AdapterError(NO_PREFIXES)
    elif kind not in OUTSIDE_BLOCKS:
        raise AdapterError(
            f"{kind} changes what blocks compute, and servers can do that for LORA only; use LORA, "
            f"swarmkit.DeepPrompts, or one of {', '.join(OUTSIDE_BLOCKS)}"
        )


def refuse_prefixes(model: object) -> None:
    """Raise AdapterError if PEFT calls `generate()` of a model to put a prefix before its keys and values.

    PEFT does that by replacing a method of the model. It gives a prefix to no cache that exists already, so
    that the answer would be the one without it.
    """
    hook = vars(model).get("prepare_inputs_for_generation")
    config = getattr(getattr(hook, "__self__", None), "active_peft_config", None)
    if config is not None:
        ensure_possible(config)


def ensure_plain(config: Any) -> None:
    """Raise AdapterError unless a LoRA config is one that remote blocks can take.

    Modules that are trained as a whole and tokens may be outside the blocks; inside they are found later.
    """
    check_config({**config.to_dict(), "modules_to_save": None, "trainable_token_indices": None})
    start = getattr(config, "init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise AdapterError(
            f"init_lora_weights={start!r} begins with the blocks' weights, which are not here; use True"
        )
