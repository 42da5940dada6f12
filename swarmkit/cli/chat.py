"""`swarmkit chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Allow, Block, IdentityFile, Join, Model, SwarmKeyFile, Threads, Verbose, app
from swarmkit.cli.generate import Draft, MaxTokens, Seed, SpeculateOption, Temperature, TopP
from swarmkit.errors import UsageError
from swarmkit.events import Event, StepFinished, following

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM


@app.command()
def chat(
    model: Model = "tiny-chat",
    join: Join = None,
    swarm_key: SwarmKeyFile = None,
    identity: IdentityFile = None,
    allow: Allow = None,
    block: Block = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    max_new_tokens: MaxTokens = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    speculate: SpeculateOption = None,
    draft: Draft = None,
    threads: Threads = None,
    verbose: Verbose = False,
) -> None:
    """Talk to a model. `/route` shows which servers computed the last answer, `/new` starts over, `/quit`
    ends.

    Examples:

        swarmkit chat

        swarmkit chat Qwen/Qwen3-32B --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…
    """
    console.setup(verbose, threads)
    console.quiet_transformers()
    console.set_threads(threads)
    from swarmkit.cli.joining import model_of, speculation_of
    from swarmkit.client.chat import chat_answer, has_chat_template

    def show(event: Event) -> None:
        if not isinstance(event, StepFinished):
            console.err.print(f"[yellow]{event}[/]", markup=True)

    with ExitStack() as owned:
        remote = owned.enter_context(model_of(model, join, swarm_key, identity, allow, block))
        if verbose:
            owned.enter_context(following(remote.connection.client.events, show))
        tokenizer = remote.tokenizer()
        if not has_chat_template(tokenizer):
            raise UsageError(f"{model} was not made for chats; use `swarmkit generate {model} --raw …`")
        speculation = speculation_of(remote, speculate.value if speculate else None, draft)
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
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                    speculation=speculation,
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
