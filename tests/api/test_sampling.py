"""How a request's wishes and the model's own generation config together choose tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from swarmkit.api.sampling import Sampling, SeededChoice, config_for, sampling_of

GREEDY = GenerationConfig(do_sample=False, repetition_penalty=1.1)
SAMPLING = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
CASES: list[tuple[GenerationConfig, dict[str, Any], Sampling]] = [
    (GREEDY, {}, Sampling(temperature=0.0, repetition_penalty=1.1)),
    (GREEDY, {"temperature": 0.7}, Sampling(temperature=0.7, repetition_penalty=1.1)),
    (SAMPLING, {}, Sampling(temperature=0.6, top_p=0.9, top_k=20)),
    (SAMPLING, {"top_p": 0.5, "temperature": None}, Sampling(temperature=0.6, top_p=0.5, top_k=20)),
    (SAMPLING, {"temperature": 0.0}, Sampling(temperature=0.0, top_p=0.9, top_k=20)),
]


@pytest.mark.parametrize(("usual", "wishes", "wanted"), CASES)
def test_a_request_counts_before_the_models_own_config(
    usual: GenerationConfig, wishes: dict[str, Any], wanted: Sampling
) -> None:
    assert sampling_of(wishes, usual) == wanted


def test_a_token_is_drawn_by_seed_row_and_position_alone() -> None:
    scores = torch.zeros(2, 1000)

    def drawn(seed: int, position: int) -> list[int]:
        ids = torch.zeros(2, position, dtype=torch.long)
        return SeededChoice(seed)(ids, scores).argmax(-1).tolist()

    assert drawn(1, 5) == drawn(1, 5)
    assert len({*drawn(1, 5), *drawn(1, 6), *drawn(2, 5)}) == 6


def test_a_token_is_drawn_as_often_as_its_probability_says() -> None:
    scores = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    choice = SeededChoice(3)
    drawn = [int(choice(torch.zeros(1, place), scores).argmax()) for place in range(2000)]
    for token, chance in enumerate((0.7, 0.2, 0.1)):
        assert drawn.count(token) / 2000 == pytest.approx(chance, abs=0.04)


def test_a_config_keeps_what_the_api_does_not_decide() -> None:
    usual = GenerationConfig(do_sample=True, temperature=0.6, no_repeat_ngram_size=4, num_beams=3)
    config = config_for(usual, frozenset([7, 2]), 9)
    assert (config.do_sample, config.num_beams, config.max_new_tokens) == (False, 1, 9)
    assert (config.eos_token_id, config.pad_token_id, config.no_repeat_ngram_size) == ([2, 7], 2, 4)
    assert usual.num_beams == 3
