"""Views follow a model at work, react to buttons, and end; no browser is needed for that."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from swarmkit import LocalSwarm, SwarmModelForCausalLM
from swarmkit.errors import UsageError
from swarmkit.events import HopTrace, MicroBatchFinished, Owner, StepFinished
from swarmkit.models.checkpoint.checkpoint import Checkpoint

from ..models.tiny import make_checkpoint
from ..waiting import wait_until

pytest.importorskip("anywidget")

from swarmkit.notebook import (
    PipelineView,
    SessionTimeline,
    SwarmView,
    TrainingView,
    generate_in_background,
)
from swarmkit.notebook.feed import MOST_PER_S
from swarmkit.notebook.widget import LiveDrawing

FULL_CURVE = 800
"""Steps after which the curve of a training has as many points as it ever has."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama"))


@pytest.fixture
def swarm(tiny: Checkpoint) -> Iterator[LocalSwarm]:
    with LocalSwarm(tiny, num_stages=2, replicas=2, transport="memory") as swarm:
        yield swarm


@pytest.fixture
def model(swarm: LocalSwarm) -> SwarmModelForCausalLM:
    return swarm.model()


def prompt(length: int = 5) -> dict[str, Any]:
    return {"input_ids": torch.arange(1, length + 1)[None], "do_sample": False}


def generate(model: SwarmModelForCausalLM, tokens: int = 6) -> torch.Tensor:
    return model.generate(**prompt(), max_new_tokens=tokens, min_new_tokens=tokens)


def press(view: LiveDrawing, action: str, target: str = "") -> None:
    view._handle_custom_msg({"action": action, "target": target}, [])


def view_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "swarmkit-view"]


def test_a_pipeline_shows_the_route_of_an_answer(model: SwarmModelForCausalLM) -> None:
    with PipelineView(model) as view:
        generate(model)
        route = " → ".join(f"{hop.label} [{hop.start}:{hop.stop}]" for hop in model.trace[-1].hops)
        wait_until(lambda: view.summary.endswith(f"route: {route}"), f"the route {route} in the view")


def test_a_pipeline_shows_a_server_that_was_lost(swarm: LocalSwarm, model: SwarmModelForCausalLM) -> None:
    with PipelineView(model) as view, model.session() as session:
        generate(model)
        lost = model.trace[-1].hops[0]
        next(server for server in swarm.servers if server.peer_id == lost.peer_id).kill()
        model.generate(**prompt(12), max_new_tokens=4)
        wait_until(lambda: f"✕ {lost.label}" in view.svg, "the lost server in the view")
        assert session.position


def test_a_pipeline_may_follow_one_session_only(model: SwarmModelForCausalLM) -> None:
    with model.session() as session, PipelineView(model, session=session) as view:
        generate(model)
    generate(model, tokens=12)
    assert f"· {session.position} tokens" in view.summary


def test_a_timeline_begins_with_the_steps_that_were(model: SwarmModelForCausalLM) -> None:
    generate(model, tokens=6)
    steps = len(model.trace)  # fewer than tokens, if some of them were guessed
    with SessionTimeline(model) as view:
        assert view.summary.startswith(f"steps: the last {steps},")


def test_a_timeline_of_a_session_needs_its_model(model: SwarmModelForCausalLM) -> None:
    with model.session() as session, pytest.raises(UsageError, match="SessionTimeline"):
        SessionTimeline(session)


def test_training_shows_loss_and_shares(model: SwarmModelForCausalLM) -> None:
    with TrainingView(model) as view:
        embeddings = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
        loss = model(inputs_embeds=embeddings).logits.square().mean()
        loss.backward()
        view.log(loss)
        wait_until(
            lambda: "1 steps · loss" in view.summary and len(view.rows_now()) > 1, "the loss and the shares"
        )


def test_killing_by_a_button_ends_a_server(swarm: LocalSwarm, model: SwarmModelForCausalLM) -> None:
    with PipelineView(model, swarm) as view:
        press(view, "kill", "0")
        wait_until(lambda: not swarm.servers[0].alive, "the end of the server")
        labels = [button["label"] for button in view.buttons]
        wait_until(
            lambda: not any("server-0" in b["label"] for b in view.buttons), f"no button of it: {labels}"
        )


def test_a_server_that_was_killed_idle_is_seen_at_once(
    swarm: LocalSwarm, model: SwarmModelForCausalLM
) -> None:
    with PipelineView(model, swarm) as view:
        press(view, "kill", "0")
        wait_until(lambda: "✕ server-0" in view.svg, "the lost server in the view")


def test_stopping_by_a_button_ends_a_server(swarm: LocalSwarm) -> None:
    with SwarmView(swarm, every_s=0.05) as view:
        press(view, "stop", "1")
        wait_until(lambda: not swarm.servers[1].alive, "the end of the server")
        wait_until(lambda: "✕ server-1" in view.svg, "the end in the view")


def test_a_server_is_added_where_the_fewest_are(swarm: LocalSwarm) -> None:
    swarm.servers[1].kill()
    with SwarmView(swarm, every_s=0.05) as view:
        press(view, "add")
        wait_until(lambda: len(swarm.servers) == 5 and swarm.servers[4].alive, "one more server")
        assert swarm.servers[4].blocks == swarm.servers[1].blocks


def test_what_a_button_cannot_do_is_told(swarm: LocalSwarm) -> None:
    with SwarmView(swarm) as view:
        press(view, "kill", "99")
        wait_until(lambda: "out of range" in view.notice, "why it failed")


def test_a_message_that_is_none_of_ours_is_ignored(swarm: LocalSwarm) -> None:
    with SwarmView(swarm) as view:
        view._handle_custom_msg("kill", [])
        view._handle_custom_msg({"action": "format", "target": "/"}, [])
        assert view.notice == ""


def test_a_swarm_view_of_a_model_shows_what_the_model_sees(model: SwarmModelForCausalLM) -> None:
    with SwarmView(model) as view:
        assert "4 servers" in view.summary


@pytest.mark.parametrize("kind", [PipelineView, SessionTimeline, TrainingView, SwarmView])
def test_a_view_ends_when_it_is_stopped(model: SwarmModelForCausalLM, kind: Any) -> None:
    view = kind(model)
    view.stop()
    view.stop()
    assert view.ended
    assert view_threads() == []


@pytest.mark.parametrize("kind", [PipelineView, SessionTimeline, TrainingView])
def test_a_view_ends_with_its_model(model: SwarmModelForCausalLM, kind: Any) -> None:
    view = kind(model)
    model.close()
    wait_until(lambda: view.ended and view_threads() == [], "the end of the view")


def test_a_swarm_view_ends_with_its_swarm(tiny: Checkpoint) -> None:
    with LocalSwarm(tiny, transport="memory") as swarm:
        view = SwarmView(swarm, every_s=0.05)
    wait_until(lambda: view.ended and view_threads() == [], "the end of the view")


def test_the_last_drawing_has_no_moving_token(model: SwarmModelForCausalLM) -> None:
    with PipelineView(model) as view:
        generate(model)
    assert "<circle" not in view.svg
    assert view.buttons == []


def test_many_steps_are_drawn_in_one(model: SwarmModelForCausalLM) -> None:
    with PipelineView(model) as view:
        drawings: list[str] = []
        view.observe(lambda change: drawings.append(change["new"]), "svg")
        started = time.monotonic()
        generate(model, tokens=60)
        passed_s = time.monotonic() - started
    assert 0 < len(drawings) <= 8 + MOST_PER_S * passed_s, "drawings come by a clock"


def finished_step(position: int, peers: Sequence[str]) -> StepFinished:
    hops = tuple(
        HopTrace(peer, f"server-{number}", 2 * number, 2 * number + 2, 0.1, 2.0, 0.5)
        for number, peer in enumerate(peers)
    )
    return StepFinished(position, 1, 1, 5.5, hops, time=1e9 + position, owner=Owner("session", "me", 1))


def micro_batch(number: int, peers: Sequence[str]) -> MicroBatchFinished:
    owner = Owner("training", "me", 1)
    return MicroBatchFinished("forward", 0, 0, 4, 100, 10.0, tuple(peers), time=1e9 + number, owner=owner)


@pytest.mark.parametrize(
    ("kind", "earlier"), [(PipelineView, 0), (SessionTimeline, 0), (TrainingView, FULL_CURVE)]
)
def test_the_last_of_ten_thousand_updates_take_no_more_work_than_the_first(
    model: SwarmModelForCausalLM, kind: Any, earlier: int
) -> None:
    """Work is counted in calls of functions, which no other load on the machine changes."""

    class Idle(kind):  # type: ignore[misc, valid-type]
        """Adds and draws when it is told to, and not by itself."""

        def take(self, event: Any) -> None:
            self._add(event)

        def draw_now(self) -> None:
            self._draw()

    view = Idle(model)
    view.stop()
    peers = [server.peer_id for server in model.connection.client.known.servers()[:2]]

    def update(number: int) -> None:
        if kind is TrainingView:
            view.log(5.0 / (1 + number))
            view.take(micro_batch(number, peers))
        else:
            view.take(finished_step(number, peers))

    def hundred_updates(first: int) -> int:
        calls = 0

        def count(frame: object, event: str, arg: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            for number in range(first, first + 100):
                update(number)
                view.draw_now()
        finally:
            sys.setprofile(None)
        return calls

    for number in range(earlier):
        update(number)
    first = hundred_updates(earlier)
    for number in range(earlier + 100, 9_900):
        update(number)
    assert hundred_updates(9_900) <= 1.2 * first


def test_a_view_has_forms_for_pages_without_widgets(model: SwarmModelForCausalLM) -> None:
    with PipelineView(model) as view:
        forms = view._repr_mimebundle_()[0]
    assert forms["text/plain"].startswith(view.summary)
    assert "<svg" in forms["text/html"]
    assert "<table" in forms["text/html"]
    assert forms["image/svg+xml"].startswith("<svg")


@pytest.mark.parametrize("what", ["model", "swarm", "session"])
def test_what_notebooks_show_is_a_picture(swarm: LocalSwarm, model: SwarmModelForCausalLM, what: str) -> None:
    generate(model)
    with model.session() as session:
        shown = {"model": model, "swarm": swarm, "session": session}[what]._repr_mimebundle_()
    assert "server-0" in shown["text/html"]
    assert shown["text/plain"].startswith("<")
    assert "Embedding(" not in shown["text/plain"]  # not transformers' tree of modules


def test_a_sessions_picture_has_the_times_of_its_last_step(model: SwarmModelForCausalLM) -> None:
    with model.session() as session:
        generate(model)
        shown = session._repr_mimebundle_()["text/html"]
    assert f"{model.trace[-1].hops[0].total_ms:.1f} ms" in shown


def test_an_answer_in_the_background_is_the_same(model: SwarmModelForCausalLM) -> None:
    answer = generate_in_background(model, **prompt(), max_new_tokens=6, min_new_tokens=6)
    assert answer.result(timeout=60).tolist() == generate(model).tolist()
    assert answer.done


def test_an_answer_in_the_background_can_be_stopped(model: SwarmModelForCausalLM) -> None:
    with model.subscribe() as events:
        answer = generate_in_background(model, **prompt(), max_new_tokens=4000, min_new_tokens=4000)
        assert events.get(timeout=60) is not None
        answer.stop()
        tokens = answer.result(timeout=60)
    assert 5 < tokens.shape[1] < 4000


def test_an_answer_in_the_background_raises_what_generate_raises(model: SwarmModelForCausalLM) -> None:
    answer = generate_in_background(model, **prompt(), no_such_option=1)
    with pytest.raises(ValueError, match="no_such_option"):
        answer.result(timeout=60)


async def test_an_answer_in_the_background_can_be_awaited(model: SwarmModelForCausalLM) -> None:
    answer = generate_in_background(model, **prompt(), max_new_tokens=6, min_new_tokens=6)
    assert (await answer).tolist() == generate(model).tolist()


async def test_who_waits_no_longer_stops_the_answer(model: SwarmModelForCausalLM) -> None:
    with model.subscribe() as events:
        answer = generate_in_background(model, **prompt(), max_new_tokens=4000, min_new_tokens=4000)
        assert events.get(timeout=60) is not None
        waits = asyncio.ensure_future(answer)
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert answer.result(timeout=60).shape[1] < 4000
