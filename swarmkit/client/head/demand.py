"""Which logits a call of `generate()` needs to be exact, as far as its processors tell. Pure decisions.

A server tells the largest logits of a token. Whether they suffice depends on what is done to them::

    logits ── editors ── / temperature ── the first filter ── whatever follows ── argmax, or a draw

*Editors* change the logits of tokens that can be named beforehand (those of the text, or an end token), and
of no others. *Filters* leave only the likeliest tokens. All tokens whose logits did not come are at most as
likely as a bound that is known. If the first filter, or the argmax, provably leaves out all that is below the
bound, its outcome is that of complete logits. Any other processor may look at every logit: then complete ones
are needed from the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

_OF_THE_TEXT = (RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor)
"""Editors of the logits of tokens that stand in the text."""
_NAMED = {
    MinLengthLogitsProcessor: "eos_token_id",
    MinNewTokensLengthLogitsProcessor: "eos_token_id",
    SuppressTokensLogitsProcessor: "suppress_tokens",
    SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
}
"""Editors of the logits of certain tokens, and their attribute with these tokens."""
_FILTERS = (TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)

_SPARE = 16
"""Logits that are asked for beside the `top_k` of a call, for those that editors make unlikely."""
_ROUNDING = 2e-5
"""How far the sum of all probabilities may be from 1 in float32."""


@dataclass(frozen=True)
class LogitsDemand:
    """What a call of `generate()` does with the logits of each token.

    Attributes:
        editors: before the first filter, in their order.
        filter: the first one; None = the likeliest token is taken.
        temperature: by which the filter's logits are divided.
    """

    editors: tuple[LogitsProcessor, ...] = ()
    filter: LogitsProcessor | None = None
    temperature: float = 1.0

    def top(self, usual: int) -> int:
        """How many of the largest logits are to be asked for, if `usual` many usually are."""
        if isinstance(self.filter, TopKLogitsWarper):
            return max(usual, int(self.filter.top_k) + _SPARE)
        return usual

    def named_tokens(self, text: Tensor) -> Tensor:
        """The tokens whose logits editors may change behind a text `[rows, tokens]`: sorted, int64."""
        found = [torch.empty(0, dtype=torch.int64)]
        for editor in self.editors:
            name = _NAMED.get(type(editor))
            tokens: Any = text if name is None else getattr(editor, name)
            found.append(torch.as_tensor(tokens).detach().to("cpu", torch.int64).flatten())
        return torch.cat(found).unique()

    def edit(self, text: Tensor, row: Tensor) -> Tensor:
        """What the editors make of logits `[rows, vocabulary]` behind a text `[rows, tokens]`."""
        for editor in self.editors:
            row = editor(text, row)
        return row

    def suffices(self, edited: Tensor, bound: float, tail: float, slack: float) -> bool:
        """Whether the outcome for one row is that of complete logits.

        Args:
            edited: `[known tokens]`, float64: the logits that are known, as the editors leave them.
            bound: no other token has a larger logit.
            tail: the sum of exp((logit - the largest edited one) / temperature) over all other tokens.
            slack: by how much a logit may be wrong.
        """
        safe = edited > bound
        chosen: Any = self.filter
        least = 1
        if isinstance(chosen, TopKLogitsWarper):
            least = int(chosen.top_k)
        elif chosen is not None:
            least = int(chosen.min_tokens_to_keep)
        if int(safe.sum()) < least:
            return False
        if isinstance(chosen, MinPLogitsWarper):
            return bool(edited.max() + self.temperature * math.log(max(chosen.min_p, 1e-300)) > bound)
        if isinstance(chosen, TopPLogitsWarper):
            weights = ((edited - edited.max()) / self.temperature).exp()
            total = weights.sum() + tail
            # Where a token's place in the order is at stake, or the limit falls between two tokens only
            # by rounding, complete logits decide.
            sure = weights[safe].sort(descending=True).values.cumsum(0) / total
            error = _ROUNDING + tail / float(total) * math.expm1(min(2 * slack / self.temperature, 100.0))
            reached = bool(sure[-1] > chosen.top_p + error)
            return reached and bool(((sure - chosen.top_p).abs() > error).all())
        return True


def demand_of(processors: Sequence[LogitsProcessor], config: GenerationConfig) -> LogitsDemand | None:
    """What a call with these prepared processors needs; None = complete logits.

    Args: config: of the call, with all that was given to it.
    """
    if config.get_generation_mode() not in _MODES:
        return None
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return None
    if config.assistant_ensemble_weight is not None:
        return None
    editors: list[LogitsProcessor] = []
    temperature = 1.0
    for processor in processors:
        kind = type(processor)
        if kind in _FILTERS:
            return LogitsDemand(tuple(editors), processor, temperature)
        if kind is TemperatureLogitsWarper and temperature == 1.0:
            temperature = float(vars(processor)["temperature"])
        elif temperature == 1.0 and (kind in _OF_THE_TEXT or kind in _NAMED):
            editors.append(processor)
        else:
            return None
    # Whatever is drawn from all tokens may be any of them.
    return None if config.do_sample else LogitsDemand(tuple(editors))
