"""Clients that close their connection in the middle of an answer: it ends, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from swarmkit.api.engine import AnswerRequest
from tests.api.held import held_engine
from tests.api.worlds import STORY, Api
from tests.waiting import WITHIN, wait_until

LONG: dict[str, Any] = {
    "model": "tiny-chat",
    "messages": STORY,
    "max_tokens": 1500,
    "logit_bias": {"1": -100},  # the token that would end the story
}


def services(api: Api) -> list[Any]:
    return [server.serving.sessions for server in api.swarm.servers]  # type: ignore[attr-defined]


def steps(api: Api) -> int:
    return max(service.steps for service in services(api))


def is_empty(api: Api) -> bool:
    return not (
        any(service.num_sessions or service.budget.leased_bytes for service in services(api))
        or api.service.turns.running
        or api.service.turns.waiting
    )


def ask_raw(api: Api, path: str, body: dict[str, Any], **headers: str) -> socket.socket:
    """Send a request over a connection of its own."""
    parts = urlsplit(api.url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0), WITHIN)
    sent = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
    return connection


def ask_and_leave(api: Api, draw: random.Random) -> None:
    """Ask for something long, and close the connection at some moment of it."""
    stream = draw.random() < 0.7
    connection = ask_raw(api, "/v1/chat/completions", {**LONG, "stream": stream, "n": draw.choice([1, 1, 2])})
    if stream:
        for _ in range(draw.randint(0, 3)):
            assert connection.recv(4096)
    else:
        time.sleep(draw.choice([0.0, 0.002, 0.02]))
    connection.close()


def check_closed(api: Api, times: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(times):
        ask_and_leave(api, draw)
    wait_until(lambda: is_empty(api), "nothing is held for closed connections")
    for service in services(api):
        service.budget.audit()


def test_closed_connections_leave_nothing(api: Api) -> None:
    check_closed(api, 20, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_500_closed_connections_leave_nothing(api: Api) -> None:
    for seed in range(25):
        check_closed(api, 20, seed)


def check_freed_within_a_step(api: Api, times: int, seed: int) -> None:
    """Close connections while a step waits at one of the stages: it is not waited for."""
    draw = random.Random(seed)
    for _ in range(times):
        engine = draw.choice(api.swarm.servers).serving.engine  # type: ignore[attr-defined]
        body = {**LONG, "stream": True, "n": draw.choice([1, 1, 2])}
        tokens = draw.randint(0, 3)
        connection = None if tokens == 0 else ask_raw(api, "/v1/chat/completions", body)
        for _ in range(tokens):
            assert connection is not None
            assert connection.recv(4096)
        with held_engine(engine):
            connection = connection or ask_raw(api, "/v1/chat/completions", body)
            wait_until(lambda engine=engine: engine.waiting, "a step waits", every=0.001)
            before = [service.steps for service in services(api)]
            connection.close()
            wait_until(lambda: is_empty(api), "every page is free while the step still waits", every=0.001)
        for service, steps_before in zip(services(api), before, strict=True):
            assert service.steps <= steps_before + 1
            service.budget.audit()


def test_a_closed_connection_frees_all_pages_within_a_step(api: Api) -> None:
    check_freed_within_a_step(api, 10, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_500_closed_connections_free_all_pages_within_a_step(api: Api) -> None:
    check_freed_within_a_step(api, 500, seed=2)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_with_its_connection_and_not_with_its_last_token(api: Api, stream: bool) -> None:
    before = steps(api)
    connection = ask_raw(api, "/v1/chat/completions", {**LONG, "stream": stream})
    wait_until(lambda: steps(api) > before + 3, "the answer is under way")
    connection.close()
    wait_until(lambda: is_empty(api), "its pages are free")
    assert steps(api) < before + LONG["max_tokens"] // 2


def test_other_answers_go_on_when_one_connection_is_closed(api: Api, client: openai.OpenAI) -> None:
    wanted = client.chat.completions.create(model="tiny-chat", messages=STORY).choices[0].message.content
    stream = client.chat.completions.create(model="tiny-chat", messages=STORY, stream=True)
    first = next(iter(stream))
    ask_raw(api, "/v1/chat/completions", {**LONG, "stream": True}).close()
    rest = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert (first.choices[0].delta.content or "") + "".join(rest) == wanted


def test_a_request_that_waits_for_its_turn_leaves_the_queue_with_its_connection(api: Api) -> None:
    turns = api.service.turns
    running = [ask_raw(api, "/v1/chat/completions", LONG) for _ in range(api.service.settings.max_running)]
    wait_until(lambda: turns.running == len(running), "all places are taken")
    waiting = ask_raw(api, "/v1/chat/completions", LONG)
    wait_until(lambda: turns.waiting == 1, "one more waits")
    waiting.close()
    wait_until(lambda: turns.waiting == 0, "it waits no more")
    for connection in running:
        connection.close()
    wait_until(lambda: is_empty(api), "nothing is left")


def test_an_answer_whose_event_loop_has_ended_ends_and_says_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    engine = api.service.engine
    prompt = engine.tokenizer("Tell me a story")["input_ids"]
    answer = engine.answer(AnswerRequest(prompt=prompt, max_tokens=1500))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(answer))
    loop.close()
    wait_until(
        lambda: "swarmkit-answer" not in {thread.name for thread in threading.enumerate()},
        "the answer's thread has ended",
    )
    wait_until(lambda: is_empty(api), "its pages are free")
    assert not raised
