"""Chat completions and completions, as OpenAI's own client sees them."""

from __future__ import annotations

import json
import random
from typing import Any

import openai
import pytest
import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from tests.api.worlds import STORY, SUM, Api

# answers


@pytest.fixture(scope="module")
def local() -> Any:
    return load_local(Checkpoint.open("tiny-chat"))


def locally(local: Any, tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = local.generate(prompt["input_ids"], do_sample=False, **options)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_chat_is_answered_as_the_local_model_answers(api: Api, client: openai.OpenAI, local: Any) -> None:
    wanted = locally(local, api.swarm.tokenizer(), STORY, max_new_tokens=400)
    found = client.chat.completions.create(model="tiny-chat", messages=STORY)  # type: ignore[arg-type]
    assert found.choices[0].message.content == wanted
    assert found.choices[0].finish_reason == "stop"


def test_usage_counts_the_tokens_of_prompt_and_answer(api: Api, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny-chat", messages=STORY, max_tokens=7)  # type: ignore[arg-type]
    prompt = api.swarm.tokenizer().apply_chat_template(STORY, add_generation_prompt=True)["input_ids"]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 7)
    assert found.choices[0].finish_reason == "length"


def test_text_is_continued_as_the_local_model_continues_it(
    api: Api, client: openai.OpenAI, local: Any
) -> None:
    tokenizer = api.swarm.tokenizer()
    ids = tokenizer("The fox said", return_tensors="pt").input_ids
    wanted = local.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    for prompt in ("The fox said", ids[0].tolist(), [ids[0].tolist()]):
        found = client.completions.create(model="tiny-chat", prompt=prompt, max_tokens=12)
        assert found.choices[0].text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_several_prompts_have_their_answers_in_order(client: openai.OpenAI) -> None:
    prompts = ["The fox", "A hen"]
    alone = [client.completions.create(model="tiny-chat", prompt=each).choices[0].text for each in prompts]
    found = client.completions.create(model="tiny-chat", prompt=prompts, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [alone[0], alone[0], alone[1], alone[1]]


def test_a_stop_string_ends_an_answer_also_inside_of_tokens(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny-chat", messages=STORY).choices[0].message.content or ""
    for start in range(12, 40, 7):
        stop = whole[start : start + 5]
        found = client.chat.completions.create(model="tiny-chat", messages=STORY, stop=[stop])
        assert found.choices[0].message.content == whole[: whole.index(stop)]
        assert found.choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_answer_beside_other_requests(client: openai.OpenAI) -> None:
    def story(seed: int, n: int = 1) -> list[str | None]:
        found = client.chat.completions.create(
            model="tiny-chat", messages=STORY, temperature=1.5, seed=seed, n=n, max_tokens=30
        )
        return [choice.message.content for choice in found.choices]

    assert story(5) == story(5) == story(5, n=3)[:1]
    assert len({*story(5, n=3), *story(6, n=3)}) > 3


def test_probabilities_are_those_of_the_local_model(api: Api, client: openai.OpenAI, local: Any) -> None:
    tokenizer = api.swarm.tokenizer()
    found = client.completions.create(
        model="tiny-chat", prompt="The fox said", max_tokens=4, logprobs=3, echo=True
    )
    told = found.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.tokens is not None
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokenizer.tokenize("The fox said"))])
    with torch.no_grad():
        whole = local.generate(ids, max_new_tokens=4, do_sample=False)
        chances = torch.log_softmax(local(whole).logits[0].float(), -1)
    wanted = [float(chances[place, token]) for place, token in enumerate(whole[0, 1:].tolist())]
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(wanted[: len(told.tokens) - 1], abs=1e-4)
    assert "".join(told.tokens) == found.choices[0].text


def test_an_echo_alone_computes_no_answer(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny-chat", prompt="The fox said", max_tokens=0, echo=True, logprobs=1
    )
    assert found.choices[0].text == "The fox said"
    assert found.usage is not None
    assert found.usage.completion_tokens == 0


def test_a_bias_forbids_a_token(api: Api, client: openai.OpenAI) -> None:
    first = client.completions.create(model="tiny-chat", prompt="The fox said", max_tokens=1).choices[0].text
    token = api.swarm.tokenizer().encode(first, add_special_tokens=False)[0]
    found = client.completions.create(
        model="tiny-chat", prompt="The fox said", max_tokens=1, logit_bias={str(token): -100}
    )
    assert found.choices[0].text != first


def test_an_answer_keeps_to_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"hungry": {"type": "boolean"}, "animal": {"enum": ["fox", "hen"]}},
        "required": ["hungry", "animal"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    found = client.chat.completions.create(model="tiny-chat", messages=STORY, response_format=form)
    answer = json.loads(found.choices[0].message.content or "")
    assert answer["animal"] in ("fox", "hen")
    assert isinstance(answer["hungry"], bool)
    assert found.choices[0].finish_reason == "stop"


def test_a_conversation_that_goes_on_computes_only_what_is_new(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny-chat", messages=STORY)
    messages: Any = [
        *STORY,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    found = client.chat.completions.create(model="tiny-chat", messages=messages)
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens_details.cached_tokens or 0) >= found.usage.prompt_tokens // 2


# streams


def folded(chunks: Any) -> list[dict[str, Any]]:
    """The choices that the chunks of a chat's stream make up."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for one in chunk.choices:
            choice = choices.setdefault(one.index, {"text": "", "reason": None, "logprobs": []})
            assert choice["reason"] is None, "nothing comes after the end"
            choice["text"] += one.delta.content or ""
            choice["reason"] = one.finish_reason
            choice["logprobs"] += [each.logprob for each in one.logprobs.content] if one.logprobs else []
    return [choices[index] for index in sorted(choices)]


def random_request(seed: int) -> dict[str, Any]:
    """A chat with options of any kind, the same for the same seed."""
    draw = random.Random(seed)
    subject = draw.choice(["a fox", "a hen", "the sea", "3 + 4", "Örebro"])
    request: dict[str, Any] = {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": f"{draw.choice(['Tell me of', 'What is'])} {subject}?"}],
        "max_tokens": draw.randint(1, 24),
        "temperature": draw.choice([0, 0.7, 1.5]),
        "seed": seed,
        "n": draw.choice([1, 1, 3]),
    }
    if draw.random() < 0.4:
        request["stop"] = draw.sample(["the", ". ", "e", "fo", "ing"], 2)
    if draw.random() < 0.3:
        request |= {"logprobs": True, "top_logprobs": draw.randint(0, 3)}
    if draw.random() < 0.2:
        request["response_format"] = {"type": "json_object"}
    if draw.random() < 0.3:
        request |= {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.9}
    return request


def check_stream(client: openai.OpenAI, request: dict[str, Any]) -> None:
    plain = client.chat.completions.create(**request)
    *chunks, last = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    assert [choice["text"] for choice in folded(chunks)] == [c.message.content for c in plain.choices]
    assert [choice["reason"] for choice in folded(chunks)] == [c.finish_reason for c in plain.choices]
    for streamed, choice in zip(folded(chunks), plain.choices, strict=True):
        told = choice.logprobs.content or [] if choice.logprobs else []
        assert streamed["logprobs"] == pytest.approx([each.logprob for each in told], abs=1e-3)
    assert last.choices == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(last.usage, name) for name in counts] == [getattr(plain.usage, name) for name in counts]


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_tells_what_the_plain_answer_does(client: openai.OpenAI, seed: int) -> None:
    check_stream(client, random_request(seed))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_streams_tell_what_200_plain_answers_do(client: openai.OpenAI) -> None:
    for seed in range(8, 208):
        check_stream(client, random_request(seed))


@pytest.mark.parametrize("options", [{}, {"echo": True, "logprobs": 2}, {"n": 3, "stop": "e"}])
def test_a_stream_of_text_tells_what_the_plain_answer_does(
    client: openai.OpenAI, options: dict[str, Any]
) -> None:
    request: dict[str, Any] = {"model": "tiny-chat", "prompt": ["The fox", "A hen said"], **options}
    plain = client.completions.create(**request)
    texts: dict[int, str] = {}
    reasons: dict[int, Any] = {}
    logprobs: dict[int, list[Any]] = {}
    for chunk in client.completions.create(**request, stream=True):
        for one in chunk.choices:
            texts[one.index] = texts.get(one.index, "") + one.text
            reasons[one.index] = one.finish_reason
            told = one.logprobs.token_logprobs or [] if one.logprobs else []
            logprobs[one.index] = logprobs.get(one.index, []) + told
    for choice in plain.choices:
        assert (texts[choice.index], reasons[choice.index]) == (choice.text, choice.finish_reason)
        if choice.logprobs:
            assert logprobs[choice.index][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)  # type: ignore[index]


def test_a_stream_without_wish_for_usage_tells_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny-chat", messages=SUM, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


# refusals

REFUSED: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "an image": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}
            ]
        },
        400,
        "messages[0].content[0]",
        "cannot take images",
    ),
    "audio as the answer": ({"modalities": ["text", "audio"]}, 400, "modalities", "cannot take audio"),
    "tools without a place for them": (
        {"tools": [{"type": "function", "function": {"name": "add"}}]},
        400,
        "tools",
        "has no place for tools",
    ),
    "another model": ({"model": "gpt-5"}, 404, "model", "has the model 'tiny-chat'"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "a temperature below 0": ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    "a role that the template does not know": (
        {"messages": [{"role": "tool", "content": "5", "tool_call_id": "a"}]},
        400,
        "messages",
        "tiny-chat knows the roles",
    ),
    "too long a prompt": (
        {"messages": [{"role": "user", "content": "fox " * 3000}]},
        400,
        "messages",
        "this model takes 2048 at most",
    ),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "fox"}}}},
        400,
        "response_format",
        "schema cannot be used",
    ),
    "a bias of no token": ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "not one of the model's"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_with_the_parameter_at_fault(
    client: openai.OpenAI, what: str, stream: bool
) -> None:
    options, status, param, words = REFUSED[what]
    request: dict[str, Any] = {"model": "tiny-chat", "messages": SUM, "stream": stream, **options}
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**request)
    assert (refused.value.status_code, refused.value.param) == (status, param)
    assert words in str(refused.value)


def test_a_body_that_is_no_json_is_refused(api: Api) -> None:
    with api.http() as http:
        answer = http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
