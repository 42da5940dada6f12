"""`swarmkit generate`: one answer."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import (
    Allow,
    Block,
    IdentityFile,
    Join,
    Json,
    Model,
    SwarmKeyFile,
    Threads,
    Verbose,
    app,
)

MaxTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 = always the likeliest token.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of probability.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


class Speculate(StrEnum):
    """Where draft tokens come from."""

    OFF = "off"
    AUTO = "auto"
    PROMPT_LOOKUP = "prompt-lookup"


SpeculateOption = Annotated[
    Speculate | None,
    typer.Option(
        "--speculate",
        help="Draft tokens by looking them up in the text: where the answer is the same without (auto, the "
        "default), or also where tokens are sampled (prompt-lookup).",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", help="A small model with the same tokens that drafts them; it is loaded here."),
]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to say; `-` reads standard input.")],
    join: Join = None,
    swarm_key: SwarmKeyFile = None,
    identity: IdentityFile = None,
    allow: Allow = None,
    block: Block = None,
    max_new_tokens: MaxTokens = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    speculate: SpeculateOption = None,
    draft: Draft = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; use no chat template.")] = False,
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print a model's answer to one prompt, as it comes.

    Examples:

        swarmkit generate tiny-chat "What is 3 + 4?"

        swarmkit generate Qwen/Qwen3-32B "Write a haiku" --join … --temperature 0.7 --seed 1
    """
    console.setup(verbose, threads)
    console.quiet_transformers()
    console.set_threads(threads)
    from swarmkit.cli.joining import model_of, speculation_of
    from swarmkit.client.chat import chat_answer, has_chat_template

    text = sys.stdin.read() if prompt == "-" else prompt
    with model_of(model, join, swarm_key, identity, allow, block) as remote:
        tokenizer = remote.tokenizer()
        chat = not raw and has_chat_template(tokenizer)
        answer = chat_answer(
            remote,
            tokenizer,
            [{"role": "user", "content": text}] if chat else text,
            write=(lambda piece: None)
            if json
            else lambda piece: console.out.print(piece, end="", markup=False),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            speculation=speculation_of(remote, speculate.value if speculate else None, draft),
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
