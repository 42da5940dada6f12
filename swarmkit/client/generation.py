"""Options of transformers' `generate()` that mean something else over a session than over a local cache."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from swarmkit.errors import SessionError, UsageError

_NEW_TOKENS = 20
"""What transformers generates where neither a length nor a number of new tokens is given."""


def without_cache_implementation(
    options: dict[str, Any], configured: Callable[[str], Any], own_config: Any
) -> dict[str, Any]:
    """The options without `cache_implementation`: how a cache lies in memory is decided by servers.

    Args:
        options: of `generate()`, by name.
        configured: the value of an option wherever it is given, None if nowhere.
        own_config: the model's generation config, which holds where no other is given.

    Raises:
        UsageError: the wished one would change the answer.
    """
    wished = configured("cache_implementation")
    if wished is None:
        return options
    if "quant" in str(wished):
        raise UsageError(
            f"cache_implementation={wished!r} is not possible: the servers keep keys and values in the "
            "precision that they compute in"
        )
    config = copy.copy(options.get("generation_config") or own_config)
    config.cache_implementation = None
    others = {name: value for name, value in options.items() if name != "cache_implementation"}
    return others | {"generation_config": config}


@dataclass(frozen=True)
class LengthLimit:
    """How many tokens a call can add until its session is full.

    Attributes:
        prompt: tokens per row before the answer.
        held: tokens per row that the session may hold; one more can be generated, and is not held.
        is_models: whether no session could hold more, because the model cannot take more.
    """

    prompt: int
    held: int
    is_models: bool

    @property
    def room(self) -> int:
        return self.held + 1 - self.prompt

    def apply(self, options: dict[str, Any], configured: Callable[[str], Any]) -> dict[str, Any]:
        """The options of `generate()`, with as many new tokens as there is room for at most.

        Raises:
            SessionError: the prompt alone is too long.
        """
        if self.room < 1:
            raise SessionError(f"the prompt has {self.prompt} tokens, and {self._reason}")
        if self.room >= self._wished(configured):
            return options
        others = {name: value for name, value in options.items() if name != "max_length"}
        if (configured("min_new_tokens") or 0) > self.room:
            others["min_new_tokens"] = self.room
        return others | {"max_new_tokens": self.room}

    def tell(self, new_tokens: int, configured: Callable[[str], Any]) -> None:
        """Warn if an answer of so many tokens ended because there was no more room."""
        if new_tokens >= self.room and self.room < self._wished(configured):
            warnings.warn(f"the answer ends after {new_tokens} tokens: {self._reason}", stacklevel=5)

    def _wished(self, configured: Callable[[str], Any]) -> int:
        wished = configured("max_new_tokens")
        if wished is None:
            length = configured("max_length")
            wished = _NEW_TOKENS if length is None else length - self.prompt
        return int(wished)

    @property
    def _reason(self) -> str:
        if self.is_models:
            return f"the model takes {self.held} at most; give a shorter prompt"
        return f"the session holds {self.held} at most; open one with a larger max_length"


def prompt_length(tokens: torch.Tensor | None, embeddings: torch.Tensor | None) -> int:
    """Tokens per row before the answer; transformers begins with one token where nothing is given."""
    given = tokens if embeddings is None else embeddings
    return 1 if given is None else given.shape[1]
