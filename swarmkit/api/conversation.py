"""A conversation that is to be continued, as all chat formats mean it, and the run that continues it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import LogitsProcessor

from swarmkit.api.engine import AnswerEngine, AnswerRequest, PromptComputed, answer_room
from swarmkit.api.grammar import GrammarConstraint, call_grammar, json_grammar
from swarmkit.api.message_events import MessageEnd, MessageEvent, MessageReader
from swarmkit.api.refusals import ApiError, invalid
from swarmkit.api.sampling import sampling_of
from swarmkit.api.tool_format import AnswerFormat, answer_format


@dataclass(frozen=True)
class ChatWish:
    """What a chat request asks for.

    Attributes:
        messages: in the form of chat templates, content as text.
        tools: in the form of chat templates.
        choice: `"auto"`, `"none"`, `"required"`, or the name of a tool that must be called.
        continues: whether the last message is the beginning of the answer.
        schema: the answer is JSON that keeps to it; an empty one stands for any object; None = free text.
        sampling: fields of `Sampling` by name; None = the model's usual.
        options: for the chat template.
        params: what the format calls messages, tools, the choice among them, and the schema, for errors.
    """

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    choice: str = "auto"
    most_calls: int | None = None
    continues: bool = False
    schema: dict[str, Any] | None = None
    answers: int = 1
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)

    def param(self, name: str) -> str:
        """What the format calls a part of the request."""
        return self.params.get(name, name)


@dataclass
class ChatRun:
    """A conversation under way, and its usage as far as it is known.

    Attributes:
        cached_tokens: of the prompt, held by servers since an earlier session.
    """

    engine: AnswerEngine
    request: AnswerRequest
    form: AnswerFormat
    prompt_text: str
    tools: list[dict[str, Any]] | None
    most_calls: int | None
    cached_tokens: int = 0
    generated_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the rendered conversation."""
        return len(self.request.prompt)

    async def events(self) -> AsyncGenerator[MessageEvent, None]:
        """Run, and tell the messages while they grow. Closing the iterator ends the run."""
        readers = [
            MessageReader(row, self.form, self.prompt_text, self.tools, self.most_calls)
            for row in range(self.request.answers)
        ]
        async with aclosing(self.engine.answer(self.request)) as answer:
            async for event in answer:
                if isinstance(event, PromptComputed):
                    self.cached_tokens = event.cached
                    continue
                for told in readers[event.row].read(event):
                    if isinstance(told, MessageEnd):
                        self.generated_tokens += told.generated
                    yield told


class ChatModel:
    """A model that continues conversations: its chat template, and how it writes calls of tools."""

    def __init__(self, engine: AnswerEngine, most_tokens: int) -> None:
        """Prepare for conversations.

        Args: most_tokens: of an answer, whatever a request wishes.
        """
        self._engine = engine
        self._most_tokens = most_tokens
        self.form = answer_format(engine.tokenizer)

    def prepare(self, wish: ChatWish) -> ChatRun:
        """Check a wish and render it; takes a while for long conversations, so call it in a thread.

        Raises:
            ApiError: the wish cannot be fulfilled.
        """
        if not getattr(self._engine.tokenizer, "chat_template", None):
            raise ApiError(
                400,
                "this model has no chat template, because it was not made for chats; use /v1/completions",
                code="no_chat_template",
            )
        tools = None if wish.choice == "none" else wish.tools or None
        if wish.tools and not self.form.takes_tools:
            raise invalid(
                wish.param("tools"),
                "the chat template of this model has no place for tools; leave them out, or use another "
                "model",
                "unsupported_tools",
            )
        if wish.choice not in ("auto", "none") and not tools:
            raise invalid(wish.param("tool_choice"), "a tool must be called, but no tools are given")
        text, tokens = self._render(wish, tools)
        room = answer_room(self._engine, tokens, wish.param("messages"))
        most = min(room, self._most_tokens)
        request = AnswerRequest(
            prompt=tokens,
            max_tokens=most if wish.max_tokens is None else min(wish.max_tokens, most),
            sampling=sampling_of(wish.sampling, self._engine.model.generation_config),
            answers=wish.answers,
            stops=wish.stops,
            logprobs=wish.logprobs,
            keep_special=self.form.template is not None,
            constraint=self._constraint(wish, tools, len(tokens)),
        )
        return ChatRun(self._engine, request, self.form, text, tools, wish.most_calls)

    def _render(self, wish: ChatWish, tools: list[dict[str, Any]] | None) -> tuple[str, list[int]]:
        tokenizer = self._engine.tokenizer
        try:
            text = tokenizer.apply_chat_template(
                wish.messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=not wish.continues,
                continue_final_message=wish.continues,
                **wish.options,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise invalid(
                wish.param("messages"), f"the model's chat template refuses these messages: {error}"
            ) from None
        return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _constraint(self, wish: ChatWish, tools: list[dict[str, Any]] | None, prompt_tokens: int) -> Any:
        if tools and wish.choice != "auto":
            grammar = self._call_grammar(wish, tools)
        elif wish.schema is not None:
            grammar = json_grammar(wish.schema or None, wish.param("schema"))
        else:
            return None
        engine = self._engine

        def make() -> LogitsProcessor:
            return GrammarConstraint(
                grammar, engine.tokenizer, engine.model.config.vocab_size, engine.ends, prompt_tokens
            )

        return make

    def _call_grammar(self, wish: ChatWish, tools: list[dict[str, Any]]) -> str:
        param = wish.param("tool_choice")
        functions = [tool["function"] for tool in tools]
        if wish.choice != "required":
            functions = [each for each in functions if each["name"] == wish.choice]
        if not functions:
            raise invalid(param, f"there is no tool named {wish.choice!r}")
        if not self.form.opening:
            raise invalid(
                param,
                "this model can be let call a tool, but not be made to; use the choice 'auto'",
                "unsupported_choice",
            )
        return call_grammar(self.form.opening, self.form.closing, functions, self._engine.tokenizer, param)


def arguments_of(text: str, param: str) -> Any:
    """The arguments of an earlier call, from JSON, as chat templates want them.

    Raises:
        ApiError: they are not JSON.
    """
    try:
        return json.loads(text or "{}")
    except ValueError:
        raise invalid(param, "the arguments of a call must be JSON") from None
