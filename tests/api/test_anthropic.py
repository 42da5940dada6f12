"""Messages, as Anthropic's own client sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.api.worlds import STORY, SUM, Api
from tests.waiting import WITHIN


@pytest.fixture(scope="module")
def claude(api: Api) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=api.url, api_key="none", max_retries=0, timeout=WITHIN) as client:
        yield client


REQUEST: dict[str, Any] = {"model": "tiny-chat", "max_tokens": 200, "messages": STORY}


def test_a_message_is_answered_as_by_the_other_protocol(
    claude: anthropic.Anthropic, client: openai.OpenAI
) -> None:
    wanted = client.chat.completions.create(model="tiny-chat", messages=STORY)  # type: ignore[arg-type]
    found = claude.messages.create(**REQUEST)
    [block] = found.content
    assert block.type == "text"
    assert block.text == wanted.choices[0].message.content
    assert found.stop_reason == "end_turn"
    assert wanted.usage is not None
    read = found.usage.cache_read_input_tokens or 0
    assert found.usage.input_tokens + read == wanted.usage.prompt_tokens
    assert found.usage.output_tokens == wanted.usage.completion_tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens": 5}, {"stop_sequences": ["the"]}, {"extra_body": {"temperature": 0.0, "top_k": 3}}],
)
def test_a_stream_tells_what_the_plain_answer_does(
    claude: anthropic.Anthropic, options: dict[str, Any]
) -> None:
    plain = claude.messages.create(**{**REQUEST, **options})
    with claude.messages.stream(**{**REQUEST, **options}) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_message()
    assert [block.model_dump() for block in found.content] == [block.model_dump() for block in plain.content]
    assert (found.stop_reason, found.stop_sequence) == (plain.stop_reason, plain.stop_sequence)
    assert found.usage.output_tokens == plain.usage.output_tokens
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_the_beginning_of_an_answer_is_continued(claude: anthropic.Anthropic) -> None:
    begun = {"role": "assistant", "content": "One morning a fox"}
    found = claude.messages.create(**{**REQUEST, "messages": [*STORY, begun], "max_tokens": 20})
    assert found.content[0].type == "text"
    assert found.content[0].text.strip()
    assert not found.content[0].text.startswith("One morning a fox")


def test_a_system_prompt_and_blocks_of_text_are_parts_of_the_prompt(claude: anthropic.Anthropic) -> None:
    def count(**options: Any) -> int:
        return claude.messages.count_tokens(**{"model": "tiny-chat", "messages": SUM, **options}).input_tokens

    blocks = [{"role": "user", "content": [{"type": "text", "text": each["content"]} for each in SUM]}]
    assert count(messages=blocks) == count()
    assert count(system=[{"type": "text", "text": "Be kind."}]) == count(system="Be kind.") > count()


def test_an_answer_keeps_to_a_json_schema(claude: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"hungry": {"type": "boolean"}},
        "required": ["hungry"],
        "additionalProperties": False,
    }
    found = claude.messages.create(
        **REQUEST, extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    )
    assert found.content[0].type == "text"
    assert isinstance(json.loads(found.content[0].text)["hungry"], bool)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://a/b.png"}}
REFUSED: dict[str, tuple[dict[str, Any], type[anthropic.APIStatusError], str]] = {
    "an image": (
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        anthropic.BadRequestError,
        "messages.0.content.0: this server runs a text model and cannot take images",
    ),
    "a tool of the server": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        anthropic.BadRequestError,
        "tools.0: this server runs no tools of its own",
    ),
    "no tokens": ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
    "another model": ({"model": "claude-9"}, anthropic.NotFoundError, "has the model 'tiny-chat'"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_anthropics_words(
    claude: anthropic.Anthropic, what: str, stream: bool
) -> None:
    options, kind, words = REFUSED[what]
    with pytest.raises(kind, match=words) as refused:
        claude.messages.create(**{**REQUEST, **options, "stream": stream})
    body: Any = refused.value.body
    assert body["type"] == "error"
