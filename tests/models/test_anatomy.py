"""What a model calls things is found by looking at it, not by its version."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
from torch import Tensor, nn

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import cache_argument


def renaming(old: str, new: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lets an old name pass, as transformers does."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renamed

    return decorator


class Before(nn.Module):
    def forward(self, inputs_embeds: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        return past_key_values


class Since(nn.Module):
    @renaming("past_key_values", "cache")
    def forward(self, inputs_embeds: Tensor, cache: Any = None, **kwargs: Any) -> Any:
        return cache


class Without(nn.Module):
    @renaming("past_key_values", "cache")
    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return inputs_embeds


@pytest.mark.parametrize(("model", "name"), [(Before, "past_key_values"), (Since, "cache")])
def test_a_cache_is_called_what_the_models_own_function_calls_it(model: type[nn.Module], name: str) -> None:
    assert cache_argument(model) == name


def test_a_model_that_takes_no_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="Without takes no cache"):
        cache_argument(Without)
