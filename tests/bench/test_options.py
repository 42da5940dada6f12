"""The commands of `swarmkit bench` are what the options of the benchmarks say."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from swarmkit.bench.options import BENCHMARKS, Benchmark, option
from swarmkit.bench.progress import Progress, quiet
from swarmkit.cli.bench import command_of
from swarmkit.cli.bench.tables import TABLES
from swarmkit.cli.commands import app
from swarmkit.errors import UsageError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED = [
    path for path in sorted(RESULTS.glob("*.json")) if json.loads(path.read_text()).get("benchmark") in TABLES
]
each_benchmark = pytest.mark.parametrize("benchmark_class", BENCHMARKS, ids=lambda each: each.name)


@dataclass(frozen=True)
class Sample(Benchmark):
    """A benchmark that gives back its options."""

    name = "sample"
    seen: ClassVar[list[Benchmark]] = []

    sizes: tuple[int, ...] = option((1, 2), "Several numbers.")
    names: tuple[str, ...] = option(("a",), "Several words.")
    rounds: int = option(3, "A number.", min=2, flag="--turns")
    fast: bool = option(True, "A switch.")

    def run(self, on_progress: Progress = quiet) -> dict[str, Any]:
        self.seen.append(self)
        return {"sound": False, "left": ["a stream"], "errors": []}


def given(*arguments: str) -> Any:
    commands = typer.Typer()
    commands.command("sample")(command_of(Sample))
    return CliRunner().invoke(commands, [*arguments, "--json"])


@each_benchmark
def test_the_help_of_a_command_has_every_option_with_its_explanation(
    benchmark_class: type[Benchmark],
) -> None:
    shown = CliRunner().invoke(app, ["bench", benchmark_class.name, "--help"], env={"COLUMNS": "1000"}).output
    for each in fields(benchmark_class):
        flag = each.metadata.get("flag", f"--{each.name.replace('_', '-')}")
        assert flag in shown
        assert each.metadata["help"].replace("`", "") in shown


@each_benchmark
def test_a_benchmark_has_a_table(benchmark_class: type[Benchmark]) -> None:
    assert benchmark_class.name in TABLES


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_table_shows_a_result_that_was_stored(path: Path) -> None:
    result = json.loads(path.read_text())
    console = Console(width=200)
    with console.capture() as capture:
        console.print(TABLES[result["benchmark"]](result))
    assert len(capture.get().splitlines()) > 4


def test_options_that_are_given_replace_the_defaults() -> None:
    given("--sizes", "3,4", "--names", "x,y", "--turns", "2", "--no-fast")
    assert Sample.seen.pop() == Sample((3, 4), ("x", "y"), 2, False)


def test_without_options_the_defaults_hold() -> None:
    given()
    assert Sample.seen.pop() == Sample()


@pytest.mark.parametrize("sizes", ["", "1,b", "0,1"])
def test_what_is_not_a_list_of_numbers_is_refused(sizes: str) -> None:
    error = given("--sizes", sizes).exception
    assert isinstance(error, UsageError)
    assert "--sizes takes numbers, as in 1,2,4" in str(error)


def test_a_benchmark_that_found_something_wrong_exits_with_code_1() -> None:
    assert given().exit_code == 1
    Sample.seen.clear()
