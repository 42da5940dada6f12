"""`swarmkit chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Model, app
from swarmkit.cli.options import AnswerOptions, ProcessOptions, SwarmOptions, with_groups
from swarmkit.errors import UsageError
from swarmkit.events import Event, StepFinished, following

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM


@app.command()
@with_groups
def chat(
    swarm: SwarmOptions,
    answering: AnswerOptions,
    process: ProcessOptions,
    model: Model = "tiny-chat",
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
) -> None:
    """Talk to a model. `/route` shows which servers computed the last answer, `/new` starts over, `/quit`
    ends.

    Examples:

        swarmkit chat

        swarmkit chat Qwen/Qwen3-32B --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…
    """
    process.prepare()
    from swarmkit.client.chat import chat_answer, has_chat_template

    def show(event: Event) -> None:
        if not isinstance(event, StepFinished):
            console.err.print(f"[yellow]{event}[/]", markup=True)

    with ExitStack() as owned:
        remote = owned.enter_context(swarm.model(model))
        if process.verbose:
            owned.enter_context(following(remote.connection.client.events, show))
        tokenizer = remote.tokenizer()
        if not has_chat_template(tokenizer):
            raise UsageError(f"{model} was not made for chats; use `swarmkit generate {model} --raw …`")
        options = answering.of(remote)
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        session = remote.session()
        try:
            for line in lines("you  › "):
                if line == "/quit":
                    break
                if line == "/new":
                    messages = list(opening)
                    continue
                if line == "/route":
                    show_route(remote)
                    continue
                messages.append({"role": "user", "content": line})
                console.out.print("model› ", end="", style="bold cyan")
                answer = chat_answer(
                    remote,
                    tokenizer,
                    messages,
                    session=session,
                    write=lambda piece: console.out.print(piece, end="", markup=False),
                    **options,
                )
                messages.append({"role": "assistant", "content": answer.text})
                console.out.print(f"\n[dim]{answer.summary}[/]")
        except KeyboardInterrupt:
            console.out.print()
        finally:
            session.close()


def lines(prompt: str):  # type: ignore[no-untyped-def]
    """What the user types, line by line, until the end of input."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = console.out.input(f"[bold green]{prompt}[/]") if interactive else input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def show_route(remote: SwarmModelForCausalLM) -> None:
    """The servers of the last steps, hop by hop, with times."""
    from swarmkit.cli.route_table import route_table

    trace = remote.trace
    console.out.print(route_table(trace) if trace else "nothing was computed yet")
