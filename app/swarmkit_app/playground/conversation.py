"""A conversation as the page keeps it, its visitor's settings, and what is asked of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarmkit.api.engine import AnswerEngine, AnswerRequest, answer_room, new_seed
from swarmkit.api.sampling import Sampling
from swarmkit.client.speculation.assistants import Speculation

Message = dict[str, Any]
"""`role` and `content`, as gradio and chat templates have them; gradio's content may be a list of parts."""


@dataclass(frozen=True)
class ChatOptions:
    """What a visitor has set.

    Attributes:
        system: the system prompt; none if empty.
        temperature: 0 takes the likeliest token each time.
        top_k: 0 = all tokens.
        seed: below 0 = another one for each answer.
        speculation: `"auto"`, `"prompt-lookup"` or `"off"`.
        stops: strings that end an answer.
    """

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 200
    seed: int = -1
    speculation: Speculation = "auto"
    top_k: int = 0
    repetition_penalty: float = 1.0
    stops: tuple[str, ...] = ()

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        # A browser sends 2 for 2.0, and transformers takes floating-point numbers only.
        return Sampling(
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=self.top_k,
            repetition_penalty=float(self.repetition_penalty),
            seed=self.seed if self.seed >= 0 else new_seed(),
        )


def text_of(message: Message) -> str:
    """The text of a message, whether it is one string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else str(part.get("text", "")) for part in parts]
    return "".join(texts)


def plain(history: Sequence[Message]) -> list[Message]:
    """The same messages with text for content."""
    return [{"role": message["role"], "content": text_of(message)} for message in history]


def until_user(history: Sequence[Message], index: int) -> list[Message]:
    """The conversation up to the user's message at or before `index`, with that message.

    Returns: an empty list if the user has said nothing until there.
    """
    for place in range(min(index, len(history) - 1), -1, -1):
        if history[place]["role"] == "user":
            return plain(history[: place + 1])
    return []


def edited(history: Sequence[Message], index: int, text: str) -> list[Message]:
    """The conversation up to the user's message at `index`, which now says something else."""
    return [*plain(history[:index]), {"role": "user", "content": text}]


def prompt_of(history: Sequence[Message], options: ChatOptions) -> list[Message]:
    """The messages that the model is given."""
    system = [{"role": "system", "content": options.system}] if options.system.strip() else []
    return [*system, *plain(history)]


def chat_request(engine: AnswerEngine, history: Sequence[Message], options: ChatOptions) -> AnswerRequest:
    """Ask for the next message of a conversation, or for the rest of one that the model has begun.

    Raises:
        ApiError: the conversation is longer than the model's context.
    """
    begun = bool(history) and history[-1]["role"] == "assistant"
    prompt = engine.tokenizer.apply_chat_template(
        prompt_of(history, options),
        add_generation_prompt=not begun,
        continue_final_message=begun,
        return_dict=False,
    )
    return _request(engine, prompt, options, "message")


def completion_request(engine: AnswerEngine, text: str, options: ChatOptions) -> AnswerRequest:
    """Ask for what follows a text, with the probability of each token.

    Raises:
        ApiError: there is no text, or it is longer than the model's context.
    """
    first = engine.tokenizer.bos_token
    begins = first is not None and text.startswith(first)  # a text that begins so needs no further one
    prompt = engine.tokenizer(text, add_special_tokens=not begins)["input_ids"]
    return _request(engine, prompt, options, "text", logprobs=5)


def _request(
    engine: AnswerEngine, prompt: Sequence[int], options: ChatOptions, param: str, logprobs: int | None = None
) -> AnswerRequest:
    room = answer_room(engine, prompt, param)
    return AnswerRequest(
        prompt,
        min(options.max_tokens, room),
        options.sampling(),
        stops=options.stops,
        logprobs=logprobs,
        speculation=options.speculation,
    )
