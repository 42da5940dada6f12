"""Groups of options: what commands have in common is said once."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from swarmkit.cli.app import Json, Model
from swarmkit.cli.options import AnswerOptions, ProcessOptions, Speculate, SwarmOptions, with_groups

TAKEN: list[Any] = []


@with_groups
def command(
    model: Model, swarm: SwarmOptions, answering: AnswerOptions, process: ProcessOptions, json: Json = False
) -> None:
    """Do something."""
    TAKEN[:] = [model, swarm, answering, process, json]


def taken(*arguments: str) -> list[Any]:
    """What the command is given."""
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return TAKEN


def test_a_command_takes_each_group_as_one_value() -> None:
    words = "tiny-chat --join a -j b --allow c --seed 3 --speculate off --threads 2 --json"
    assert taken(*words.split()) == [
        "tiny-chat",
        SwarmOptions(join=["a", "b"], allow=["c"]),
        AnswerOptions(seed=3, speculate=Speculate.OFF),
        ProcessOptions(threads=2),
        True,
    ]


def test_options_that_are_not_given_have_the_values_of_their_group() -> None:
    assert taken("tiny-chat") == ["tiny-chat", SwarmOptions(), AnswerOptions(), ProcessOptions(), False]


@pytest.mark.parametrize("option", ["--max-new-tokens=0", "--top-p=2", "--threads=0", "--speculate=often"])
def test_an_option_of_a_group_is_checked_as_others_are(option: str) -> None:
    app = typer.Typer()
    app.command()(command)
    assert CliRunner().invoke(app, ["tiny-chat", option]).exit_code == 2
