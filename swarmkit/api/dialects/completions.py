"""OpenAI's completions of plain text: `POST /v1/completions`, with echo and probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field

from swarmkit.api.dialects.openai_parts import (
    Name,
    SamplingFields,
    StreamOptions,
    bias_of,
    new_id,
    stops_of,
    usage_of,
)
from swarmkit.api.engine import AnswerEngine, AnswerRequest, PromptComputed, answer_room
from swarmkit.api.refusals import invalid
from swarmkit.api.rows import AnswerEnd, AnswerPiece
from swarmkit.api.sampling import sampling_of
from swarmkit.client.token_chances import TokenRecord

_USUAL_TOKENS = 16
_MOST_ANSWERS = 128
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(SamplingFields):
    """The body of a request for a completion."""

    model: Name
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=16)
    best_of: int | None = Field(default=None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    logit_bias: dict[str, float] | None = None

    def requests(self, engine: AnswerEngine, most_tokens: int) -> list[AnswerRequest]:
        """What it asks for, prompt by prompt; takes a while for long prompts.

        Raises:
            ApiError: it asks for what cannot be done.
        """
        if self.suffix:
            raise invalid(
                "suffix", "this server writes what follows a prompt, not what stands before a suffix"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of", "best_of other than n is not supported; choose among n answers yourself")
        prompts = self._prompts(engine)
        if len(prompts) * (self.n or 1) > _MOST_ANSWERS:
            raise invalid("prompt", f"one request can have {_MOST_ANSWERS} answers at most")
        vocabulary = engine.model.config.vocab_size
        sampling = sampling_of(
            self.sampling() | {"logit_bias": bias_of(self.logit_bias, vocabulary)},
            engine.model.generation_config,
        )
        found = []
        for place, prompt in enumerate(prompts):
            where = "prompt" if len(prompts) == 1 else f"prompt[{place}]"
            if any(token >= vocabulary for token in prompt):
                raise invalid(where, f"a token id is less than {vocabulary}, which is the model's vocabulary")
            wished = _USUAL_TOKENS if self.max_tokens is None else self.max_tokens
            found.append(
                AnswerRequest(
                    prompt=prompt,
                    max_tokens=min(wished, answer_room(engine, prompt, where), most_tokens),
                    sampling=sampling,
                    answers=self.n or 1,
                    stops=stops_of(self.stop),
                    logprobs=self.logprobs,
                    prompt_logprobs=self.logprobs if self.echo else None,
                )
            )
        return found

    def _prompts(self, engine: AnswerEngine) -> list[list[int]]:
        if isinstance(self.prompt, str):
            return [_tokens(engine, self.prompt)]
        if not self.prompt:
            raise invalid("prompt", "the prompt is empty")
        if all(isinstance(each, int) for each in self.prompt):
            return [[int(each) for each in self.prompt if isinstance(each, int)]]
        return [_tokens(engine, each) if isinstance(each, str) else list(each) for each in self.prompt]  # type: ignore[arg-type]


def _tokens(engine: AnswerEngine, text: str) -> list[int]:
    tokens = list(engine.tokenizer(text)["input_ids"])
    if not tokens and engine.tokenizer.bos_token_id is not None:
        return [int(engine.tokenizer.bos_token_id)]  # which is what an empty text begins with
    return tokens


class CompletionForm:
    """Words the answers to one request."""

    def __init__(
        self,
        wire: CompletionRequest,
        model: str,
        created: int,
        engine: AnswerEngine,
        requests: Sequence[AnswerRequest],
    ) -> None:
        self._wire = wire
        self._engine = engine
        self._requests = requests
        self._head = {"id": new_id("cmpl-"), "object": "text_completion", "created": created, "model": model}
        self._cached = 0
        self._generated = 0

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answers while they grow."""
        options = self._wire.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        async with aclosing(self._choices()) as choices:
            async for choice in choices:
                yield {**self._head, "choices": [choice], **usage}
        if usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        """The answers when they are whole."""
        choices: dict[int, dict[str, Any]] = {}
        async for more in self._choices():
            choice = choices.setdefault(more["index"], more)
            if choice is more:
                continue
            choice["text"] += more["text"]
            choice["finish_reason"] = more["finish_reason"]
            if more["logprobs"] is not None:
                if choice["logprobs"] is None:
                    choice["logprobs"] = more["logprobs"]
                else:
                    for name, values in more["logprobs"].items():
                        choice["logprobs"][name] = choice["logprobs"][name] + values
        return {**self._head, "choices": [choices[row] for row in sorted(choices)], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        prompts = sum(len(request.prompt) for request in self._requests)
        return usage_of(prompts, self._cached, self._generated)

    async def _choices(self) -> AsyncGenerator[dict[str, Any], None]:
        for number, request in enumerate(self._requests):
            first = number * request.answers
            offset = 0
            async with aclosing(self._engine.answer(request)) as answer:
                async for event in answer:
                    if isinstance(event, PromptComputed):
                        self._cached += event.cached
                        if self._wire.echo:
                            text, told = self._echo(request, event)
                            offset = len(text)
                            for row in range(request.answers):
                                yield _choice(first + row, text, told)
                    elif isinstance(event, AnswerPiece):
                        told = None if self._wire.logprobs is None else _logprobs(event.tokens, offset)
                        yield _choice(first + event.row, event.text, told)
                    elif isinstance(event, AnswerEnd):
                        self._generated += event.generated
                        yield _choice(first + event.row, "", None, event.reason)

    def _echo(self, request: AnswerRequest, event: PromptComputed) -> tuple[str, dict[str, Any] | None]:
        """The prompt as a part of the answer, with its probabilities; the first token has none."""
        tokenizer = self._engine.tokenizer
        text = str(tokenizer.decode(request.prompt, skip_special_tokens=True))
        if request.prompt_logprobs is None:
            return text, None
        offset = 0
        told: dict[str, list[Any]] = {
            "tokens": [str(tokenizer.decode([request.prompt[0]]))],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [0],
        }
        shown = len(str(tokenizer.decode([request.prompt[0]], skip_special_tokens=True)))
        for record in event.records:
            offset, shown = shown, shown + len(record.chosen.text)
            for name, values in _logprobs([record], 0).items():
                told[name] += values
            told["text_offset"][-1] = min(offset, len(text))
        return text, told


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(tokens: Sequence[TokenRecord], offset: int) -> dict[str, list[Any]]:
    return {
        "tokens": [each.chosen.text for each in tokens],
        "token_logprobs": [each.chosen.logprob for each in tokens],
        "top_logprobs": [_by_text(each) for each in tokens],
        "text_offset": [offset + each.offset for each in tokens],
    }


def _by_text(record: TokenRecord) -> dict[str, float]:
    """The likeliest tokens and the chosen one, by their text, of which the likeliest counts."""
    found: dict[str, float] = {}
    for each in (*record.likeliest, record.chosen):
        found.setdefault(each.text, each.logprob)
    return found
