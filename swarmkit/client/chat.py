"""Answers that stream, to chats and to plain text, for commands and user interfaces alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.client.session.session import Session
    from swarmkit.client.speculation.assistants import Speculation, SpeculationCount


@dataclass(frozen=True)
class ChatAnswer:
    """A finished answer and the times at which it came.

    Attributes:
        seconds: from the call to the last token.
        stamps: when each token came, in seconds on the clock that was handed in.
        speculation: the draft tokens that were tried; None if there were none.
    """

    text: str
    tokens: list[int]
    seconds: float
    stamps: list[float]
    speculation: SpeculationCount | None = None

    @property
    def summary(self) -> str:
        """The speed of the answer in a few words."""
        drafted = f", {self.speculation}" if self.speculation else ""
        return f"{self.tokens_per_s:.1f} tokens/s{drafted}"

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def chat_answer(
    model: SwarmModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, str]] | str,
    *,
    session: Session | None = None,
    write: Callable[[str], None] = lambda text: None,
    on_token: Callable[[int], None] = lambda count: None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    speculation: dict[str, Any] | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> ChatAnswer:
    """Let the model answer, and pass on the text while it comes.

    Args:
        prompt: chat messages, which go through the model's chat template, or plain text.
        session: the session to go on in; one for this answer alone if not given.
        write: called with each new piece of text, on this thread.
        on_token: called with the number of tokens so far, on this thread.
        temperature: 0 takes the likeliest token each time.
        speculation: options of `generate()` about draft tokens, as `draft_options` returns them.

    Raises what `model.generate()` raises, and whatever `write` and `on_token` raise, which ends the answer.
    """
    if isinstance(prompt, str):
        inputs = dict(tokenizer(prompt, return_tensors="pt"))
    else:
        inputs = dict(
            tokenizer.apply_chat_template(  # type: ignore[arg-type]
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        )
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling.update(temperature=temperature, top_p=top_p)
    stream = _TextStream(tokenizer, write, on_token, clock)
    before = model.speculation
    started = clock.now()
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        session=session,
        streamer=stream,
        max_new_tokens=max_new_tokens,
        **sampling,
        **(speculation or {}),
    )
    seconds = clock.now() - started
    text = str(tokenizer.decode(stream.tokens, skip_special_tokens=True)).strip()
    drafted = model.speculation.since(before)
    return ChatAnswer(text, stream.tokens, seconds, stream.stamps, drafted if drafted.drafted else None)


def draft_options(
    model: SwarmModelForCausalLM, draft: str | None = None, speculation: Speculation | None = None
) -> dict[str, Any]:
    """Return the options of `generate()` that say where draft tokens come from.

    Args:
        draft: the name of a small model that drafts them. It is loaded whole, into this process.
        speculation: how tokens are looked up in the text; None leaves it to the client's settings.

    Raises:
        UsageError: both a draft and `"prompt-lookup"` were given.
    """
    if draft is None:
        return {"speculation": speculation}
    if speculation == "prompt-lookup":
        raise UsageError("give either prompt-lookup or a draft model, not both")
    checkpoint = Checkpoint.open(draft)
    small = load_local(checkpoint)
    options: dict[str, Any] = {"speculation": speculation, "assistant_model": small}
    if small.config.vocab_size != model.config.vocab_size:
        options |= {"tokenizer": model.tokenizer(), "assistant_tokenizer": checkpoint.tokenizer()}
    return options


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the model was made for chats."""
    return bool(getattr(tokenizer, "chat_template", None))


class _TextStream:
    """A streamer for transformers: passes on text as soon as it is readable, and notes every token."""

    takes_several = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], None],
        on_token: Callable[[int], None],
        clock: Clock,
    ) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._on_token = on_token
        self._clock = clock
        self._prompt_seen = False
        self._shown = ""
        self.tokens: list[int] = []
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.stamps.append(self._clock.now())
            self.tokens.append(token)
            text = self._text()
            # An unfinished character decodes to the replacement mark: hold it back until it is whole.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._write(text[len(self._shown) :])
                self._shown = text
            self._on_token(len(self.tokens))

    def end(self) -> None:
        self._write(self._text()[len(self._shown) :])

    def _text(self) -> str:
        return str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
