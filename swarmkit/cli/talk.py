"""What `generate`, `chat` and `demo` share: a model over some swarm, and answers that stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from swarmkit.cli import console
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.client.session.session import Session
    from swarmkit.client.speculation.assistants import GuessCount, Speculation


@contextmanager
def model_of(name: str, join: list[str] | None) -> Iterator[Any]:
    """The model over the swarm of `join`, or over one of its own in this process."""
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.local.swarm import LocalSwarm

    if join:
        with busy("joining the swarm"):
            model = SwarmModelForCausalLM.from_pretrained(name, initial_peers=join)
        with model:
            yield model
        return
    with busy("no --join: starting a swarm of two servers in this process"):
        swarm = LocalSwarm(name, num_stages=2).start()
    with swarm:
        yield swarm.model()


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show that something is under way."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console.err, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


@dataclass
class ChatAnswer:
    """A finished answer and how fast it came."""

    text: str
    tokens: list[int]
    seconds: float
    stamps: list[float] = field(default_factory=list)
    """When each token came, on `time.perf_counter`'s clock."""
    guessed: GuessCount | None = None
    """Tokens that were guessed ahead; None = none were."""

    @property
    def summary(self) -> str:
        """How fast it came, in a few words."""
        guessed = f", {self.guessed}" if self.guessed else ""
        return f"{self.tokens_per_s:.1f} tokens/s{guessed}"

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


class _Stream:
    """A transformers streamer: text to `write` as soon as it is readable, and a note of every token."""

    takes_several = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], None],
        on_token: Callable[[int], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._on_token = on_token
        self._prompt_seen = False
        self._shown = ""
        self.tokens: list[int] = []
        self.stamps: list[float] = []

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.stamps.append(time.perf_counter())
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


def answer(
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
    guesses: dict[str, Any] | None = None,
) -> ChatAnswer:
    """Let the model answer.

    Args:
        prompt: chat messages, which go through the chat template, or plain text.
        write: called with each new piece of text.
        on_token: called with the number of tokens so far.
        temperature: 0 = always the likeliest token.
        guesses: what `guesses_of` found.
    """
    import torch

    if isinstance(prompt, str):
        inputs = dict(tokenizer(prompt, return_tensors="pt"))
    else:
        inputs = dict(
            tokenizer.apply_chat_template(  # type: ignore[arg-type]
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        )
    wanted = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling.update(temperature=temperature, top_p=top_p)
    stream = _Stream(tokenizer, write, on_token)
    before = model.speculation
    started = time.perf_counter()
    model.generate(
        **wanted,
        session=session,
        streamer=stream,
        max_new_tokens=max_new_tokens,
        **sampling,
        **(guesses or {}),
    )
    seconds = time.perf_counter() - started
    text = str(tokenizer.decode(stream.tokens, skip_special_tokens=True)).strip()
    guessed = model.speculation.since(before)
    return ChatAnswer(text, stream.tokens, seconds, stream.stamps, guessed if guessed.guesses else None)


def guesses_of(
    model: SwarmModelForCausalLM, speculate: Speculation | None, draft: str | None
) -> dict[str, Any]:
    """Options of `generate()` for where guesses come from.

    Args:
        draft: the name of a small model that makes them; it is loaded whole, here.
    """
    if draft is None:
        return {"speculation": speculate}
    from swarmkit.models.checkpoint.checkpoint import Checkpoint
    from swarmkit.models.head.head import load_local

    if speculate == "prompt-lookup":
        raise UsageError("give either --speculate prompt-lookup or --draft, not both")
    with busy(f"loading the draft {draft}"):
        checkpoint = Checkpoint.open(draft)
        small = load_local(checkpoint)
    options: dict[str, Any] = {"speculation": speculate, "assistant_model": small}
    if small.config.vocab_size != model.config.vocab_size:
        options |= {"tokenizer": model.tokenizer(), "assistant_tokenizer": checkpoint.tokenizer()}
    return options


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model was made for chats."""
    return bool(getattr(tokenizer, "chat_template", None))
