"""The text below a pipeline: it comes with the answer, and each token tells how it came."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from html import unescape
from types import FrameType
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.cli.interrupt import interruptible
from swarmkit.client.answer_thread import AnswerThread
from swarmkit.errors import UsageError
from swarmkit.events import StepFinished

from ..waiting import wait_until

pytest.importorskip("anywidget")

from swarmkit.notebook import PipelineView, generate_in_background


@pytest.fixture(scope="module")
def model() -> Iterator[SwarmModelForCausalLM]:
    torch.set_num_threads(1)
    with LocalSwarm("tiny-chat", num_stages=2, transport="memory") as swarm, swarm.model() as model:
        yield model


@pytest.fixture(scope="module")
def inputs(model: SwarmModelForCausalLM) -> dict[str, Any]:
    return dict(model.tokenizer()("Tell me", return_tensors="pt")) | {"do_sample": False}


def text_of(view: PipelineView) -> str:
    return unescape(re.sub("<details>.*|<[^>]*>", "", view.tokens))


def titles_of(view: PipelineView) -> list[str]:
    return [unescape(each) for each in re.findall(r'title="([^"]*)"', view.tokens)]


def test_an_answer_that_is_shown_is_the_same(model: SwarmModelForCausalLM, inputs: dict[str, Any]) -> None:
    shown = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, view=True)
    assert shown.tolist() == model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).tolist()


def test_the_text_of_an_answer_stands_below_the_pipeline(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    with PipelineView(model) as view:
        tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, view=view)[0]
    assert text_of(view) == model.tokenizer().decode(tokens[inputs["input_ids"].shape[1] :])
    assert view.tokens in view.static_bundle()["text/html"]


def test_each_token_tells_its_time_at_every_server(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    with PipelineView(model) as view:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, view=view)
        wait_until(lambda: len(titles_of(view)) == 4 and all(titles_of(view)), "a title for each token")
    assert all(re.search(r"ms.*: server-0 [\d.]+ ms → server-1 [\d.]+ ms", each) for each in titles_of(view))


def test_probabilities_are_told_where_they_are_wished_for(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    with PipelineView(model, chances=True) as view:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, view=view)
    titles = titles_of(view)
    assert len(titles) == 4
    assert all(re.match(r"[\d.]+%; .*%", each) for each in titles)


def test_an_answer_in_the_background_shows_its_text(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    with PipelineView(model) as view:
        tokens = generate_in_background(
            model, view=view, **inputs, max_new_tokens=4, min_new_tokens=4
        ).result(60)[0]
    assert text_of(view) == model.tokenizer().decode(tokens[inputs["input_ids"].shape[1] :])


def test_of_several_answers_only_the_way_is_shown(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    with PipelineView(model) as view:
        several = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, num_beams=2, num_return_sequences=2, view=view
        )
        assert several.shape[0] == 2
    assert view.tokens == ""


def test_the_callers_streamer_gets_every_token(model: SwarmModelForCausalLM, inputs: dict[str, Any]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, streamer=streamer, view=True)[0]
    assert streamer.got == tokens.tolist()
    assert streamer.ended


def test_an_answer_that_is_shown_goes_on_in_the_session_around_it(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    with model.session() as session:
        tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, view=True)
        assert session.position == tokens.shape[1] - 1


def test_an_interrupt_ends_the_answer_and_returns_what_came(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    main = threading.main_thread().ident
    assert main is not None
    with model.subscribe(1024, StepFinished) as steps:

        def interrupt() -> None:
            if steps.get(timeout=60) is not None:
                signal.pthread_kill(main, signal.SIGINT)

        presses = threading.Thread(target=interrupt)
        with interruptible():
            presses.start()
            tokens = model.generate(**inputs, max_new_tokens=1500, min_new_tokens=1500, view=True)
        presses.join(60)
    assert inputs["input_ids"].shape[1] < tokens.shape[1] < 1500


def test_an_interrupt_while_the_answer_begins_ends_it_too(
    model: SwarmModelForCausalLM, inputs: dict[str, Any]
) -> None:
    presses = iter([signal.SIGINT])

    def interrupt(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code is AnswerThread.start.__code__:
            for each in presses:
                signal.raise_signal(each)

    with interruptible():
        sys.setprofile(interrupt)
        try:
            tokens = model.generate(**inputs, max_new_tokens=1500, min_new_tokens=1500, view=True)
        finally:
            sys.setprofile(None)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 1


def test_a_view_of_another_kind_is_refused(model: SwarmModelForCausalLM, inputs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="view=True, or the PipelineView"):
        model.generate(**inputs, view="pipeline")
