"""Answers that stream: the pieces of text, the tokens, and what they are told to do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swarmkit.client.chat import chat_answer, draft_options, has_chat_template
from swarmkit.client.model import SwarmModelForCausalLM
from swarmkit.errors import UsageError
from swarmkit.local.swarm import LocalSwarm

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]


class Ticks:
    """A clock that is one second later each time it is read."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        self.at += 1.0
        return self.at

    def time(self) -> float:
        return self.now()


@pytest.fixture(scope="module")
def model() -> Iterator[SwarmModelForCausalLM]:
    with LocalSwarm("tiny-chat", 1, transport="memory") as swarm:
        yield swarm.model()


def test_the_pieces_of_text_add_up_to_the_answer(model: SwarmModelForCausalLM) -> None:
    pieces: list[str] = []
    answer = chat_answer(model, model.tokenizer(), QUESTION, write=pieces.append, max_new_tokens=40)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer.text
    assert "7" in answer.text


def test_each_token_is_counted_and_has_its_time(model: SwarmModelForCausalLM) -> None:
    counts: list[int] = []
    answer = chat_answer(model, model.tokenizer(), QUESTION, on_token=counts.append, clock=Ticks())
    assert counts == list(range(1, len(answer.tokens) + 1))
    assert answer.stamps == [float(tick) for tick in range(2, len(answer.tokens) + 2)]
    assert answer.seconds == len(answer.tokens) + 1


def test_plain_text_is_continued_without_a_chat_template(model: SwarmModelForCausalLM) -> None:
    tokenizer = model.tokenizer()
    assert has_chat_template(tokenizer)
    assert len(chat_answer(model, tokenizer, "Once upon", max_new_tokens=3).tokens) == 3


def test_the_same_seed_samples_the_same_answer(model: SwarmModelForCausalLM) -> None:
    first, second = (
        chat_answer(model, model.tokenizer(), QUESTION, temperature=1.5, seed=4, max_new_tokens=12)
        for _ in range(2)
    )
    assert first.tokens == second.tokens


def test_an_answer_ends_when_its_reader_fails(model: SwarmModelForCausalLM) -> None:
    def fail(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        chat_answer(model, model.tokenizer(), QUESTION, write=fail)


def test_a_draft_and_prompt_lookup_cannot_both_be_chosen(model: SwarmModelForCausalLM) -> None:
    with pytest.raises(UsageError, match="not both"):
        draft_options(model, "tiny-chat", "prompt-lookup")
