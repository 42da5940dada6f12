"""Who may ask, and how much: keys, names of the host, sizes, and turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from swarmkit import LocalSwarm
from swarmkit.settings import ApiSettings
from tests.api.test_disconnects import LONG, ask_raw, is_empty
from tests.api.worlds import SUM, Api, api_of
from tests.waiting import wait_until

CHAT: dict[str, Any] = {"model": "tiny-chat", "messages": SUM}


@pytest.fixture(scope="module")
def small() -> Iterator[Api]:
    """A server with keys, that takes two requests at a time, and short bodies."""
    settings = ApiSettings(max_running=1, max_waiting=1, max_body_bytes=2000, max_tokens=1500)
    with (
        LocalSwarm("tiny-chat", num_stages=1, transport="memory") as swarm,
        api_of(swarm, api_keys=["one", "two"], aliases=["gpt-5"], settings=settings) as api,
    ):
        yield api


@pytest.mark.parametrize("headers", [{"authorization": "Bearer two"}, {"x-api-key": "one"}])
def test_each_key_opens_the_server_in_both_forms(small: Api, headers: dict[str, str]) -> None:
    with small.http(headers=headers) as http:
        assert http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/swarm.json", "/openapi.json"])
def test_nothing_is_told_without_a_key(small: Api, headers: dict[str, str], path: str) -> None:
    with small.http(headers=headers) as http:
        answer = http.get(path)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


def test_the_health_is_told_without_a_key(small: Api) -> None:
    with small.http() as http:
        assert http.get("/healthz").json() == {"status": "ok", "missing_blocks": []}


def test_the_official_client_sees_a_wrong_key_as_such(small: Api) -> None:
    with small.openai(api_key="three") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused(small: Api, announced: bool) -> None:
    body = b'{"model": "tiny-chat", "messages": "' + b"x" * 3000 + b'"}'
    content: Any = body if announced else iter([body[:1500], body[1500:]])
    headers = {"x-api-key": "one", "content-type": "application/json"}
    with small.http(headers=headers) as http:
        answer = http.post("/v1/chat/completions", content=content)
    assert answer.status_code == 413
    assert "2000 bytes at most" in answer.json()["error"]["message"]


def test_more_requests_than_may_wait_are_refused_at_once(small: Api) -> None:
    turns = small.service.turns
    held = [ask_raw(small, "/v1/chat/completions", LONG, **{"x-api-key": "one"})]
    wait_until(lambda: turns.running == 1, "one runs")
    held.append(ask_raw(small, "/v1/chat/completions", LONG, **{"x-api-key": "one"}))
    wait_until(lambda: turns.waiting == 1, "one waits")
    with small.openai(api_key="one") as client, pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**CHAT)
    assert refused.value.response.headers["retry-after"] == "2"
    for connection in held:
        connection.close()
    wait_until(lambda: is_empty(small), "nothing is left")


def test_an_answer_is_no_longer_than_the_server_allows(api: Api) -> None:
    with (
        api_of(api.swarm, settings=ApiSettings(max_tokens=5)) as short,
        short.openai() as client,
    ):
        found = client.chat.completions.create(**{**LONG, "max_tokens": 100})
    assert found.usage is not None
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (5, "length")


def test_the_model_answers_under_each_of_its_names(small: Api) -> None:
    with small.openai(api_key="one") as client:
        assert [model.id for model in client.models.list()] == ["tiny-chat", "gpt-5"]
        assert client.models.retrieve("gpt-5").id == "gpt-5"
        found = client.chat.completions.create(model="gpt-5", messages=SUM)  # type: ignore[arg-type]
    assert "7" in (found.choices[0].message.content or "")


def test_a_server_for_this_computer_alone_answers_under_no_other_name(api: Api) -> None:
    with api_of(api.swarm, local_only=True) as local, local.http() as http:
        assert http.get("/v1/models").status_code == 200
        answer = http.get("/v1/models", headers={"host": "evil.example:8000"})
    assert answer.status_code == 403
    assert "evil.example" in answer.json()["error"]["message"]
