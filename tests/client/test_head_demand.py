"""Which logits suffice for a call of `generate()`, decided from its processors and from what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from swarmkit.client.head.demand import LogitsDemand, demand_of
from swarmkit.client.head.rows import partial_rows
from swarmkit.models.head.output_layer import top_logits

VOCABULARY, WIDTH = 60, 8
GREEDY = GenerationConfig(do_sample=False)
SAMPLING = GenerationConfig(do_sample=True)


class Unknown(LogitsProcessor):  # type: ignore[misc]
    """A user's own processor, which may look at anything."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def test_the_likeliest_token_needs_the_largest_logits_only() -> None:
    assert demand_of([], GREEDY) == LogitsDemand()


def test_a_draw_from_all_tokens_needs_all_logits() -> None:
    assert demand_of([TemperatureLogitsWarper(0.7)], SAMPLING) is None


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(num_beams=3),
        GenerationConfig(return_dict_in_generate=True, output_scores=True),
        GenerationConfig(return_dict_in_generate=True, output_logits=True),
        GenerationConfig(penalty_alpha=0.6, top_k=4),
    ],
    ids=["beams", "scores", "logits", "contrastive search"],
)
def test_what_looks_at_whole_rows_needs_all_logits(config: GenerationConfig) -> None:
    assert demand_of([], config) is None


@pytest.mark.parametrize("processor", [Unknown(), TypicalLogitsWarper(0.9)], ids=["a user's", "typical"])
def test_a_processor_that_may_look_at_any_logit_needs_all(processor: LogitsProcessor) -> None:
    assert demand_of([processor, TopKLogitsWarper(5)], SAMPLING) is None


def test_a_filter_is_asked_for_more_than_it_keeps() -> None:
    demand = demand_of([TopKLogitsWarper(100)], SAMPLING)
    assert demand is not None
    assert demand.top(64) > 100


def test_the_tokens_that_editors_may_change_are_named() -> None:
    editors = [RepetitionPenaltyLogitsProcessor(1.2), SuppressTokensLogitsProcessor([50, 7])]
    demand = demand_of(editors, GREEDY)
    assert demand is not None
    assert demand.named_tokens(torch.tensor([[3, 9, 3]])).tolist() == [3, 7, 9, 50]


# rows in part and complete rows have the same outcome

FILTERS: dict[str, list[LogitsProcessor]] = {
    "argmax": [],
    "top-k": [TopKLogitsWarper(5)],
    "top-p": [TopPLogitsWarper(0.6)],
    "cold top-p": [TemperatureLogitsWarper(0.3), TopPLogitsWarper(0.9)],
    "hot min-p": [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.3)],
    "top-k, then top-p": [TopKLogitsWarper(6), TopPLogitsWarper(0.7)],
}
EDITORS: dict[str, list[LogitsProcessor]] = {
    "none": [],
    "penalty": [RepetitionPenaltyLogitsProcessor(1.7)],
    "encouragement": [RepetitionPenaltyLogitsProcessor(0.5)],
    "bans": [NoRepeatNGramLogitsProcessor(2), SuppressTokensLogitsProcessor([1, 2, 3])],
}


@pytest.mark.slow
@pytest.mark.parametrize("editors", EDITORS)
@pytest.mark.parametrize("filters", FILTERS)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 3.0]), top=st.sampled_from([2, 8, 24]))
def test_what_is_known_in_part_has_the_outcome_of_complete_rows(
    editors: str, filters: str, seed: int, spread: float, top: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    layer.weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=random), requires_grad=False)
    hidden = spread * torch.randn(1, WIDTH, generator=random)
    text = torch.randint(0, VOCABULARY, (1, 6), generator=random)
    processors = LogitsProcessorList([*EDITORS[editors], *FILTERS[filters]])
    demand = demand_of(processors, SAMPLING if FILTERS[filters] else GREEDY)
    assert demand is not None
    complete = layer(hidden)
    wanted: Any = processors(text, complete.clone())
    rows = partial_rows(
        layer, hidden, top_logits(complete, top, demand.temperature), demand.named_tokens(text)
    )
    scores = rows.padded(VOCABULARY)
    found = rows.processed(demand, processors, text, scores, 0, layer)
    assert found.argmax() == wanted.argmax()
    if FILTERS[filters]:
        torch.testing.assert_close(found.softmax(1), wanted.softmax(1), atol=1e-5, rtol=1e-4)
