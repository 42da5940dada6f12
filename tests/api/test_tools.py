"""Calls of tools: made by the model in its template's form, and read from there, in every protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from swarmkit import LocalSwarm
from swarmkit.api.message_events import MessageEnd, MessageReader, TextDelta, ThoughtDelta, ToolCallMade
from swarmkit.api.rows import AnswerEnd, AnswerPiece
from swarmkit.api.tool_format import answer_format
from tests.api.chats import ADD, WEATHER, is_weather, openai_tool, with_tools
from tests.api.worlds import SUM, Api, api_of

# reading


class Tokenizer:
    """A tokenizer of which only the chat template is looked at."""

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template


HERMES = Tokenizer("{{ tools }} <think> <tool_call>")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
XML = Tokenizer("{{ tools }} <tool_call> <function=")
XML_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"


def read(
    text: str, tokenizer: Any = HERMES, size: int = 3, prompt: str = "", most_calls: int | None = None
) -> list[Any]:
    """What is read from a text that comes in pieces; pieces of text and of thoughts are put together."""
    reader = MessageReader(0, answer_format(tokenizer), prompt, [openai_tool(ADD)], most_calls)
    events: list[Any] = []
    for start in range(0, len(text), size):
        events += reader.read(AnswerPiece(0, text[start : start + size]))
    events += reader.read(AnswerEnd(0, "stop", None, 9))
    told: list[Any] = []
    for event in events:
        if isinstance(event, ToolCallMade):
            told.append((event.number, event.name, event.arguments))
        elif isinstance(event, MessageEnd):
            told.append(event.reason)
        elif told and isinstance(told[-1], list) and told[-1][0] is type(event):
            told[-1][1] += event.text
        else:
            told.append([type(event), event.text])
    return told


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_call_is_told_apart_from_the_text_before_it(size: int) -> None:
    found = read(f"I add.{CALL}", size=size)
    assert found == [[TextDelta, "I add."], (0, "add", '{"a": 1, "b": 2}'), "tool_calls"]


@pytest.mark.parametrize("size", [1, 5])
def test_several_calls_are_numbered(size: int) -> None:
    assert read(f"{CALL}\n{CALL}", size=size) == [
        (0, "add", '{"a": 1, "b": 2}'),
        (1, "add", '{"a": 1, "b": 2}'),
        "tool_calls",
    ]


def test_calls_beyond_the_allowed_ones_are_left_out() -> None:
    assert read(CALL + CALL, most_calls=1) == [(0, "add", '{"a": 1, "b": 2}'), "tool_calls"]


@pytest.mark.parametrize("size", [1, 7])
def test_thoughts_are_told_apart(size: int) -> None:
    found = read("<think>hm</think>yes", size=size)
    assert found == [[ThoughtDelta, "hm"], [TextDelta, "yes"], "stop"]


def test_thoughts_that_the_prompt_has_opened_are_told_apart() -> None:
    found = read("hm</think>yes", prompt="<|assistant|><think>\n")
    assert [event for event in found if event != [ThoughtDelta, "\n"]][-2:] == [[TextDelta, "yes"], "stop"]
    assert found[0][0] is ThoughtDelta


def test_calls_in_the_form_of_tags_have_arguments_of_the_types_of_the_schema() -> None:
    assert read(XML_CALL, XML) == [(0, "add", '{"a": 1}'), "tool_calls"]


def test_a_call_that_is_no_json_is_passed_on_as_text() -> None:
    [text, reason] = read("<tool_call>add 1 and 2</tool_call>")
    assert (text[0], reason) == (TextDelta, "stop")
    assert "add 1 and 2" in text[1]


def test_a_template_without_marks_gives_text_alone() -> None:
    assert read(CALL, Tokenizer("{{ messages }}")) == [[TextDelta, CALL], "stop"]


# calling


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    checkpoint = with_tools(tmp_path_factory.mktemp("tools"))
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm, api_of(swarm) as api:
        yield api


TOOLS: Any = [openai_tool(WEATHER), openai_tool(ADD)]
_CALLED = {"name": "add", "arguments": '{"a": 3, "b": 4}'}
REQUEST: dict[str, Any] = {"model": "tiny-chat", "messages": SUM, "tools": TOOLS}


def test_a_tool_that_must_be_called_is_called_with_fitting_arguments(api: Api) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    with api.openai() as client:
        found = client.chat.completions.create(**REQUEST, tool_choice=choice)
    [call] = found.choices[0].message.tool_calls or []
    assert (call.function.name, found.choices[0].finish_reason) == ("weather", "tool_calls")
    assert is_weather(call.function.arguments)
    assert found.choices[0].message.content is None


def check_stream_of_calls(api: Api, seed: int) -> None:
    request = {**REQUEST, "tool_choice": "required", "temperature": 1.5, "seed": seed, "n": 2}
    with api.openai() as client:
        plain = client.chat.completions.create(**request)
        found: dict[int, Any] = {}
        usage = None
        for chunk in client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            for one in chunk.choices:
                for call in one.delta.tool_calls or []:
                    found.setdefault(one.index, []).append((call.function.name, call.function.arguments))
                if one.finish_reason:
                    found[one.index].append(one.finish_reason)
    for choice in plain.choices:
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        assert [*calls, choice.finish_reason] == found[choice.index]
        assert calls
    assert usage is not None
    assert plain.usage is not None
    assert usage.completion_tokens == plain.usage.completion_tokens


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_of_calls_tells_what_the_plain_answer_does(api: Api, seed: int) -> None:
    check_stream_of_calls(api, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_streams_of_calls_tell_what_200_plain_answers_do(api: Api) -> None:
    for seed in range(4, 204):
        check_stream_of_calls(api, seed)


def test_the_result_of_a_call_reaches_the_model(api: Api) -> None:
    called = {"id": "call_1", "type": "function", "function": _CALLED}
    messages: Any = [
        *SUM,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    with api.openai() as client:
        found = client.chat.completions.create(model="tiny-chat", messages=messages, tools=TOOLS)
    rendered = [
        *SUM,
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 3, "b": 4}}}]},
        {"role": "tool", "content": "7"},
    ]
    shown = api.swarm.tokenizer().apply_chat_template(rendered, tools=TOOLS, add_generation_prompt=True)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(shown["input_ids"])


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_no_tool_is_called_that_the_model_does_not_choose(api: Api, choice: Any) -> None:
    with api.openai() as client:
        found = client.chat.completions.create(**REQUEST, tool_choice=choice, max_tokens=20)
    assert found.choices[0].message.tool_calls is None


def test_a_choice_of_a_tool_that_is_not_there_is_refused(api: Api) -> None:
    choice = {"type": "function", "function": {"name": "fly"}}
    with api.openai() as client, pytest.raises(openai.BadRequestError, match="no tool named") as refused:
        client.chat.completions.create(**REQUEST, tool_choice=choice)
    assert refused.value.param == "tool_choice"


def test_a_response_calls_a_tool_and_goes_on_with_its_result(api: Api) -> None:
    tools: Any = [{"type": "function", **ADD, "strict": True}]
    with api.openai() as client:
        found = client.responses.create(model="tiny-chat", input="Add.", tools=tools, tool_choice="required")
        [call] = found.output
        assert call.type == "function_call"
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        after = client.responses.create(
            model="tiny-chat", input=[result], previous_response_id=found.id, tools=tools, max_output_tokens=8
        )
    assert after.usage is not None
    assert found.usage is not None
    assert after.usage.input_tokens > found.usage.input_tokens + 8


def test_a_tool_in_a_namespace_is_called_by_both_names(api: Api) -> None:
    inner = {"type": "function", **ADD, "strict": True}
    tools: Any = [{"type": "namespace", "name": "sums", "description": "Sums.", "tools": [inner]}]
    with api.openai() as client:
        found = client.responses.create(model="tiny-chat", input="Add.", tools=tools, tool_choice="required")
        [call] = found.output
        assert call.type == "function_call"
        assert (call.name, call.model_dump()["namespace"]) == ("add", "sums")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        options: Any = {"model": "tiny-chat", "tools": tools, "max_output_tokens": 8}
        after = client.responses.create(input=[result], previous_response_id=found.id, **options)
        asked: Any = {"role": "user", "content": "Add."}
        again = client.responses.create(input=[asked, call.model_dump(), result], **options)
    assert after.usage is not None
    assert again.usage is not None
    assert after.usage.input_tokens == again.usage.input_tokens


@pytest.mark.parametrize("broken", [{}, {"name": "sums"}, {"name": "sums", "tools": [3]}])
def test_a_namespace_without_a_name_or_tools_is_refused(api: Api, broken: dict[str, Any]) -> None:
    tools: Any = [{"type": "namespace", **broken}]
    with api.openai() as client, pytest.raises(openai.BadRequestError, match=r"namespace|object"):
        client.responses.create(model="tiny-chat", input="Add.", tools=tools)


def test_a_message_calls_a_tool_and_goes_on_with_its_result(api: Api) -> None:
    tools: Any = [{"name": "add", "description": "", "input_schema": ADD["parameters"]}]
    messages: Any = [{"role": "user", "content": "Add."}]
    with anthropic.Anthropic(base_url=api.url, api_key="none", max_retries=0) as client:
        found = client.messages.create(
            model="tiny-chat", max_tokens=60, messages=messages, tools=tools, tool_choice={"type": "any"}
        )
        [call] = found.content
        assert (call.type, found.stop_reason) == ("tool_use", "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
        messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        after = client.messages.create(model="tiny-chat", max_tokens=8, messages=messages, tools=tools)
    assert after.usage.output_tokens == 8 or after.stop_reason == "end_turn"
    assert call.input["a"] in (1, 2, 3)  # type: ignore[union-attr,index]
