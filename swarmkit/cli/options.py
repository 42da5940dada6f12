"""Groups of options that several commands have, each said once: a command takes a group as one value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Allow, Block, IdentityFile, Join, SwarmKeyFile, Threads, Verbose

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: a parameter that is a group stands for the options in it.

    Example::

        @app.command()
        @with_groups
        def chat(model: Model, swarm: SwarmOptions, process: ProcessOptions) -> None:
            ...
    """
    groups: dict[str, Any] = {}
    options: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(group := hints[name]):
            groups[name] = group
            options += _options_of(group)
        else:
            options.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        values = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in options}
    return run


def _options_of(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for each in fields(group):
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, hints[each.name]
        yield inspect.Parameter(each.name, kind, default=each.default, annotation=annotation)


@dataclass(frozen=True)
class SwarmOptions:
    """Which swarm a command uses, as whom, and which of its servers."""

    join: Join = None
    swarm_key: SwarmKeyFile = None
    identity: IdentityFile = None
    allow: Allow = None
    block: Block = None

    def model(self, name: str) -> AbstractContextManager[SwarmModelForCausalLM]:
        """A model over this swarm, or over a swarm in this process where none was named."""
        from swarmkit.cli.joining import model_of

        return model_of(name, self.join, self.swarm_key, self.identity, self.allow, self.block)


@dataclass(frozen=True)
class ProcessOptions:
    """How the command's own process behaves."""

    threads: Threads = None
    verbose: Verbose = False

    def prepare(self) -> None:
        """Prepare logging and threads. Call it before anything heavy is imported."""
        console.setup(self.verbose, self.threads)
        console.quiet_transformers()
        console.set_threads(self.threads)


class Speculate(StrEnum):
    """Where draft tokens come from."""

    OFF = "off"
    AUTO = "auto"
    PROMPT_LOOKUP = "prompt-lookup"


@dataclass(frozen=True)
class AnswerOptions:
    """How the model answers."""

    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer, in tokens.")
    ] = 200
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 = always the likeliest token.")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of probability.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None
    speculate: Annotated[
        Speculate | None,
        typer.Option(
            "--speculate",
            help="Draft tokens by looking them up in the text: where the answer is the same without (auto, "
            "the default), or also where tokens are sampled (prompt-lookup).",
        ),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft", help="A small model with the same tokens that drafts them; it is loaded here."
        ),
    ] = None

    def of(self, model: SwarmModelForCausalLM) -> dict[str, Any]:
        """The options of `chat_answer` for a model. Loads the draft model, if one is named."""
        from swarmkit.cli.joining import speculation_of

        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "speculation": speculation_of(
                model, self.speculate.value if self.speculate else None, self.draft
            ),
        }
