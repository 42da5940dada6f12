"""How tokens are chosen: transformers' own processors, and a choice that depends on seed and position alone.

`torch.manual_seed` is one for the whole process, so that requests at the same time would disturb each
other. Here each token is drawn with a generator of its own, whose seed follows from the request's seed, the
answer's number and the position. A request with a seed gives the same answer whatever runs beside it.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "do_sample": False,
    "return_dict_in_generate": False,
}
"""Options of `generate()` that do nothing; for None, transformers would put the model's own value there."""


@dataclass(frozen=True)
class Sampling:
    """What a request says about the choice of tokens; `temperature` 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it takes the model's likeliest token each time, and nothing changes which one that is."""
        changed = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature <= 0 and self.repetition_penalty == 1.0 and not changed


def sampling_of(wishes: dict[str, Any], usual: GenerationConfig) -> Sampling:
    """The wishes of a request, completed by what the model's own generation config says.

    Args: wishes: fields of `Sampling` by name; None = not given.
    """
    given = {name: value for name, value in wishes.items() if value is not None}
    own = {name: getattr(usual, name, None) for name in _OWN}
    if not usual.do_sample:  # transformers samples only where the config says so
        own = {"temperature": 0.0, "repetition_penalty": own["repetition_penalty"]}
        if given.get("temperature"):
            own = {"repetition_penalty": own["repetition_penalty"]}
    elif own["temperature"] is None:
        own["temperature"] = 1.0
    return Sampling(**({name: value for name, value in own.items() if value is not None} | given))


def config_for(usual: GenerationConfig, ends: frozenset[int], max_tokens: int) -> GenerationConfig:
    """The model's generation config with what the API decides itself taken out."""
    config = copy.deepcopy(usual)
    for name, value in _NEUTRAL.items():
        setattr(config, name, value)
    config.max_new_tokens = max_tokens
    config.eos_token_id = sorted(ends) or None
    if config.pad_token_id is None:
        config.pad_token_id = min(ends, default=0)
    return config


def processors_for(
    sampling: Sampling, prompt_tokens: int, constraint: LogitsProcessor | None = None
) -> LogitsProcessorList:
    """The processors after which the likeliest token is the one that was chosen.

    Args:
        prompt_tokens: tokens before the answer.
        constraint: forbids tokens that may not come next.
    """
    found: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(CountPenalties(sampling.presence_penalty, sampling.frequency_penalty, prompt_tokens))
    if sampling.logit_bias:
        found.append(TokenBias(sampling.logit_bias))
    if constraint is not None:
        found.append(constraint)
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            found.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            found.append(MinPLogitsWarper(sampling.min_p))
        found.append(SeededChoice(sampling.seed))
    return LogitsProcessorList(found)


class CountPenalties(LogitsProcessor):
    """Makes tokens less likely that the answer has already: once for being there, and for each time."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class TokenBias(LogitsProcessor):
    """Adds a number to the scores of some tokens."""

    def __init__(self, bias: dict[int, float]) -> None:
        self._tokens = torch.tensor(sorted(bias))
        self._values = torch.tensor([bias[token] for token in sorted(bias)])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self._tokens.to(scores.device)] += self._values.to(scores)
        return scores


class SeededChoice(LogitsProcessor):
    """Draws a token for each row, and leaves no other one possible."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chances = torch.softmax(scores, dim=-1)
        chosen = torch.full_like(scores, -torch.inf)
        for row, chance in enumerate(chances):
            generator = torch.Generator(scores.device).manual_seed(self._seed_of(row, input_ids.shape[1]))
            chosen[row, torch.multinomial(chance, 1, generator=generator)] = 0.0
        return chosen

    def _seed_of(self, row: int, position: int) -> int:
        text = f"{self._seed} {row} {position}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
