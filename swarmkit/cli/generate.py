"""`swarmkit generate`: one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Json, Model, app
from swarmkit.cli.options import AnswerOptions, ProcessOptions, SwarmOptions, with_groups


@app.command()
@with_groups
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to say; `-` reads standard input.")],
    swarm: SwarmOptions,
    answering: AnswerOptions,
    process: ProcessOptions,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; use no chat template.")] = False,
    json: Json = False,
) -> None:
    """Print a model's answer to one prompt, as it comes.

    Examples:

        swarmkit generate tiny-chat "What is 3 + 4?"

        swarmkit generate Qwen/Qwen3-32B "Write a haiku" --join … --temperature 0.7 --seed 1
    """
    process.prepare()
    from swarmkit.client.chat import chat_answer, has_chat_template

    text = sys.stdin.read() if prompt == "-" else prompt
    with swarm.model(model) as remote:
        tokenizer = remote.tokenizer()
        chat = not raw and has_chat_template(tokenizer)
        answer = chat_answer(
            remote,
            tokenizer,
            [{"role": "user", "content": text}] if chat else text,
            write=(lambda piece: None)
            if json
            else lambda piece: console.out.print(piece, end="", markup=False),
            **answering.of(remote),
        )
        if json:
            console.emit_json(
                answer=answer.text,
                tokens=len(answer.tokens),
                tokens_per_s=round(answer.tokens_per_s, 2),
                drafted=answer.speculation.drafted if answer.speculation else 0,
                accepted=answer.speculation.accepted if answer.speculation else 0,
                route=[str(hop) for hop in _last_route(remote)],
            )
        else:
            console.out.print()
            console.err.print(f"{len(answer.tokens)} tokens, {answer.summary}", style="dim")


def _last_route(remote: object) -> list[str]:
    trace = remote.trace  # type: ignore[attr-defined]
    return [f"{hop.label} [{hop.start}:{hop.stop}]" for hop in trace[-1].hops] if trace else []
