"""The commands as a user meets them: real processes, real exit codes, real output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

SWARMKIT = [sys.executable, "-m", "swarmkit.cli"]
TIMEOUT_S = 120


def run(
    *arguments: str, stdin: str = "", mark: str = "", timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `mark` ends up in the environment of all that it starts."""
    return subprocess.run(
        [*SWARMKIT, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=dict(os.environ, SWARMKIT_TEST_MARK=mark, HF_HUB_OFFLINE="1"),
    )


def processes_marked(mark: str) -> list[psutil.Process]:
    """Whatever is still running of what was started with `mark`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SWARMKIT_TEST_MARK") == mark:
                found.append(process)
    return found


def last_json(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(result.stdout.strip().splitlines()[-1])


@dataclass
class Running:
    """A command that runs until told to stop, with its first events read."""

    process: subprocess.Popen[str]
    event: dict[str, Any]

    @property
    def address(self) -> str:
        return self.event["addresses"][0]

    def end_with(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


def start(*arguments: str, until: str) -> Running:
    """Start a command with --json and read its events up to the one called `until`."""
    process = subprocess.Popen(
        [*SWARMKIT, *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == until:
            return Running(process, event)
    raise AssertionError(f"ended before '{until}': {process.stderr.read() if process.stderr else ''}")


@pytest.fixture(scope="module")
def swarm() -> Iterator[Running]:
    """A bootstrap peer and two servers that share tiny-chat, each a process started from the command line."""
    meeting_point = start("bootstrap", until="listening")
    join = ("--join", meeting_point.address, "--threads", "1")
    servers = [
        start("serve", "tiny-chat", "--blocks", blocks, "--name", name, *join, until="serving_started")
        for blocks, name in (("0:4", "first"), ("4:8", "second"))
    ]
    yield meeting_point
    codes = [server.end_with(signal.SIGTERM) for server in [*servers, meeting_point]]
    assert codes == [0, 0, 0]


def test_status_shows_every_server_and_exits_0_when_nothing_is_missing(swarm: Running) -> None:
    result = run("status", "--join", swarm.address, "--json")

    (model,) = last_json(result)["models"]
    assert [(s["name"], s["blocks"], s["state"]) for s in model["servers"]] == [
        ("first", [0, 4], "online"),
        ("second", [4, 8], "online"),
    ]
    assert [(s["queue"], s["expected_wait_s"]) for s in model["servers"]] == [(0, 0.0), (0, 0.0)]
    assert model["missing"] == []
    assert result.returncode == 0


def test_status_draws_a_table_for_people(swarm: Running) -> None:
    result = run("status", "--join", swarm.address)

    assert "tiny-chat · 8 blocks" in result.stdout
    assert "████" in result.stdout


def test_generate_answers_over_the_swarm(swarm: Running) -> None:
    result = run("generate", "tiny-chat", "What is 2 + 3?", "--join", swarm.address, "--json")

    answer = last_json(result)
    assert "5" in answer["answer"]
    assert answer["route"] == ["first [0:4]", "second [4:8]"]


def test_chat_answers_line_by_line_and_ends_with_its_input(swarm: Running) -> None:
    result = run("chat", "--join", swarm.address, stdin="What is 2 + 3?\n/route\n/quit\n")

    assert "5" in result.stdout
    assert "first" in result.stdout
    assert result.returncode == 0


def test_a_server_that_is_told_to_leave_disappears_from_the_swarm(swarm: Running) -> None:
    guest = start("serve", "tiny-chat", "--blocks", "0:2", "--join", swarm.address, until="serving_started")

    code = guest.end_with(signal.SIGINT)

    status = last_json(run("status", "--join", swarm.address, "--json"))
    states = {s["peer_id"]: s["state"] for s in status["models"][0]["servers"]}
    assert code == 0
    assert states.get(guest.event["owner"]["peer_id"], "leaving") == "leaving"


@pytest.mark.slow
def test_generate_without_a_swarm_makes_one_of_its_own() -> None:
    result = run("generate", "tiny-chat", "What is 2 + 3?", "--json")

    assert "5" in last_json(result)["answer"]


def test_the_demo_kills_a_server_and_the_answer_is_the_same() -> None:
    mark = uuid.uuid4().hex

    result = run("demo", "--json", mark=mark)

    told = last_json(result)
    assert result.returncode == 0, result.stderr
    assert set(told) == {
        "answer",
        "undisturbed",
        "equal",
        "killed",
        "replaced_by",
        "stall_ms",
        "tokens_per_s",
    }
    assert told["equal"] is True
    assert told["answer"] == told["undisturbed"] != ""
    assert told["replaced_by"] not in ([], [told["killed"]])
    assert "was killed with SIGKILL" in " ".join(result.stderr.split())
    assert processes_marked(mark) == []


def slowly(*case: object) -> Any:
    """Every command takes seconds to start."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "no-such-model", "Hi"), "no-such-model"),
        slowly(("serve", "tiny-chat", "--blocks", "7:12"), "not inside this model's 0:8"),
        slowly(("serve", "tiny-chat", "--blocks", "many"), "blocks are written A:B"),
        slowly(("status",), "give --join ADDRESS"),
        slowly(("status", "--join", "/ip4/127.0.0.1/tcp/9/p2p/nobody"), "nobody"),
        slowly(("bench", "decode", "--stages", "one"), "as in 1,2,4"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_exit_code_1(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)

    assert result.returncode == 1
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
