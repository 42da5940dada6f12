"""Responses, as OpenAI's own client sees them."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.api.worlds import STORY, SUM, Api, api_of

REQUEST: dict[str, Any] = {"model": "tiny-chat", "input": STORY[0]["content"]}


def test_a_response_says_what_a_chat_completion_does(client: openai.OpenAI) -> None:
    wanted = client.chat.completions.create(model="tiny-chat", messages=STORY)  # type: ignore[arg-type]
    found = client.responses.create(**REQUEST)
    assert (found.output_text, found.status) == (wanted.choices[0].message.content, "completed")
    assert found.usage is not None
    assert wanted.usage is not None
    assert found.usage.input_tokens == wanted.usage.prompt_tokens
    assert found.usage.output_tokens == wanted.usage.completion_tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_output_tokens": 5},
        {"temperature": 1.2, "extra_body": {"seed": 4}},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 6},
    ],
)
def test_a_stream_tells_what_the_plain_response_does(client: openai.OpenAI, options: dict[str, Any]) -> None:
    plain = client.responses.create(**{**REQUEST, **options})
    events = list(client.responses.create(**{**REQUEST, **options}, stream=True))
    last: Any = events[-1]
    assert last.type == f"response.{plain.status}"
    assert last.response.output_text == plain.output_text
    assert last.response.incomplete_details == plain.incomplete_details
    assert last.response.usage.total_tokens == plain.usage.total_tokens  # type: ignore[union-attr]
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == plain.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_clients_own_helper_follows_the_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(**REQUEST) as stream:
        final = stream.until_done().get_final_response()
    assert final.output_text == client.responses.create(**REQUEST).output_text


def test_a_response_can_follow_another_by_its_id(client: openai.OpenAI) -> None:
    first = client.responses.create(**REQUEST)
    whole: Any = [
        *STORY,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    wanted = client.responses.create(model="tiny-chat", input=whole)
    found = client.responses.create(model="tiny-chat", input="And then?", previous_response_id=first.id)
    assert found.output_text == wanted.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_a_response_that_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    found = client.responses.create(**REQUEST, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_a_forgotten_response_cannot_be_followed(client: openai.OpenAI) -> None:
    found = client.responses.create(**REQUEST)
    client.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.create(**REQUEST, previous_response_id=found.id)
    assert refused.value.param == "previous_response_id"


def test_a_response_is_shown_to_the_key_that_made_it_alone(api: Api) -> None:
    with (
        api_of(api.swarm, api_keys=["one", "two"]) as locked,
        locked.openai(api_key="one") as one,
        locked.openai(api_key="two") as two,
    ):
        found = one.responses.create(**REQUEST)
        assert one.responses.retrieve(found.id).id == found.id
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(found.id)


def test_a_response_keeps_to_a_json_schema(client: openai.OpenAI) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"sum": {"enum": [6, 7]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}}
    found = client.responses.create(model="tiny-chat", input=SUM, text=form)  # type: ignore[arg-type]
    assert json.loads(found.output_text)["sum"] in (6, 7)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b.png"}]}]},
        "input[0].content[0]",
        "cannot take images",
    ),
    "a tool of the server": ({"tools": [{"type": "web_search"}]}, "tools[0]", "runs no tools of its own"),
    "the background": ({"background": True}, "background", "answers at once"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_with_the_parameter_at_fault(
    client: openai.OpenAI, what: str, stream: bool
) -> None:
    options, param, words = REFUSED[what]
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.responses.create(**{**REQUEST, **options, "stream": stream})
    assert refused.value.param == param
