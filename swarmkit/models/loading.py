"""Loading tensors with transformers' own loader, and refusing models for which it would invent some."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from swarmkit.errors import ModelError
from swarmkit.models.foreign_errors import reason_of
from swarmkit.models.quantization.packed_4bit import prepare_4bit

_LOADING = threading.Lock()
"""transformers' loader sets process-wide state (default dtype, weight initialisers) while it works, and
several servers in one process may load at the same time."""


def load_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    attn_implementation: str | None = None,
    quantization: Any | None = None,
    name: str = "",
) -> PreTrainedModel:
    """Make a frozen model in evaluation mode of exactly `tensors`.

    transformers renames and fuses tensors as the architecture needs it (experts of a mixture, for instance).

    Raises:
        ModelError: a weight is missing, left over or of another shape; `name` says of which checkpoint.
    """
    options: dict[str, Any] = {"config": config, "state_dict": dict(tensors), "dtype": dtype}
    quantised = quantization is not None or getattr(config, "quantization_config", None) is not None
    if torch.device(device).type != "cpu" or quantised:
        # Quantizers choose a device by themselves if they are not told one.
        options["device_map"] = {"": torch.device(device)}
    if quantization is not None:
        options["quantization_config"] = quantization
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with loader():
        try:
            result: Any = model_class.from_pretrained(None, output_loading_info=True, **options)
        except Exception as error:
            if not quantised and not isinstance(error, RuntimeError):
                raise
            shapes = "" if quantised else _shapes_that_differ(model_class, config, tensors)
            raise ModelError(
                f"The weights of {name} do not fit its config{shapes or f': {reason_of(error)}'}. "
                "Check that config.json and the safetensors files belong together."
            ) from error
    model: PreTrainedModel
    model, info = result
    for fault, keys in (("misses", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        if keys:
            raise ModelError(
                f"{name} {fault} weights: {_shortlist(keys)}. The checkpoint is incomplete or of another "
                "architecture; download it again, or check its config.json."
            )
    model.train(False)
    model.requires_grad_(False)
    if getattr(model, "is_loaded_in_4bit", False):
        prepare_4bit(model)
    return model


def _shortlist(keys: Iterable[str], at_most: int = 6) -> str:
    ordered = sorted(keys)
    rest = len(ordered) - at_most
    return ", ".join(ordered[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def _shapes_that_differ(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Tensor]
) -> str:
    with torch.device("meta"):
        wanted = model_class(config).state_dict()
    differ = [
        f"{key} is {list(tensors[key].shape)}, not {list(want.shape)}"
        for key, want in wanted.items()
        if key in tensors and tensors[key].shape != want.shape
    ]
    return f": {_shortlist(differ, 3)}" if differ else ""


@contextmanager
def loader() -> Iterator[None]:
    """Hold the right to use transformers' loader, without its progress bar and load report."""
    logger = logging.getLogger("transformers.modeling_utils")

    def silent(record: logging.LogRecord) -> bool:
        return False

    with _LOADING:
        had_bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logger.addFilter(silent)
        try:
            yield
        finally:
            logger.removeFilter(silent)
            if had_bar:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
