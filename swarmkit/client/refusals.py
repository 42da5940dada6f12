"""What a whole model can do and a model with remote blocks cannot: each is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from swarmkit.errors import UsageError

_PRECISION = "each server chooses the precision of its blocks; see the setting `precisions`"
_OPTIONS = {
    "attn_implementation": "the attention runs on the servers, which choose its implementation",
    "device_map": "only embeddings and head are on this machine; give device='cuda' to have them on a GPU",
    "load_in_4bit": _PRECISION,
    "load_in_8bit": _PRECISION,
    "quantization_config": _PRECISION,
    "trust_remote_code": "swarmkit runs no code from a repository; only transformers' own architectures work",
}
_IGNORED = frozenset({"low_cpu_mem_usage", "use_safetensors"})
_HUB = frozenset({"revision", "token", "fingerprint", "progress"})


def hub_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `from_pretrained` that find a checkpoint, out of all that are left.

    Raises:
        UsageError: an option does not exist, or is one of transformers' that has no meaning here.
    """
    for name, value in given.items():
        if name in _HUB or name in _IGNORED or (name in _OPTIONS and not value):
            continue
        reason = _OPTIONS.get(
            name, f"there is no such option; those of the Hub are {', '.join(sorted(_HUB))}"
        )
        raise UsageError(f"from_pretrained() cannot take {name}={value!r}: {reason}")
    return {name: value for name, value in given.items() if name in _HUB}


class RefusalsMixin:
    """The methods of `PreTrainedModel` that would do something else than their names say."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a checkpoint without the blocks would load elsewhere with random ones.

        Raises:
            UsageError: always; it says what to save instead.
        """
        raise UsageError(
            "the model's blocks are on servers and their weights do not change, so there is no whole "
            "checkpoint to save here. Save what you train: an adapter with save_pretrained() of the model "
            "that get_peft_model() returned, deep prompts with DeepPrompts.save_pretrained(), or a head with "
            "torch.save({name: p for name, p in model.named_parameters() if p.requires_grad}, file). With "
            "the Trainer and no adapter, give save_strategy='no'"
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Raise, as `save_pretrained` does.

        Raises:
            UsageError: always; it says what to save instead.
        """
        self.save_pretrained()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: there is no attention on this machine.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "the attention runs on the servers, which choose its implementation; leave "
            "set_attn_implementation() out"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: continuous batching is the servers' work.

        Raises:
            UsageError: always; it says what to call instead.
        """
        raise UsageError(
            "continuous batching runs where the blocks are: servers batch all sessions that wait for them. "
            "Call generate() with the rows of a batch, or from several threads"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "a model with remote blocks is connected to a swarm and cannot be copied or pickled; make "
            "another one with from_pretrained(), in the process that is to use it"
        )


def refuse_attentions(wanted: object) -> None:
    """Refuse `output_attentions=True`.

    Raises:
        UsageError: attention weights are wanted.
    """
    if wanted:
        raise UsageError(
            "output_attentions=True is not possible: the attention weights are computed on the servers, "
            "which do not send them; output_hidden_states=True works"
        )
