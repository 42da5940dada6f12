"""The commands as a user meets them: their output and exit codes, and real processes where these matter."""

from __future__ import annotations

import contextlib
import json
import signal
import uuid
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from swarmkit.local.swarm import LocalSwarm

from .commands import Running, run, run_here, start

pytestmark = pytest.mark.usefixtures("kept_fork_server")


def processes_marked(mark: str) -> list[psutil.Process]:
    """What still runs of all that was started with `mark` in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PYTEST_SWARM_MARK") == mark:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """An address of a swarm of two servers that share tiny-chat."""
    with LocalSwarm("tiny-chat", num_stages=2) as swarm:
        yield swarm.initial_peers[0]


@pytest.fixture(scope="module")
def meeting_point() -> Iterator[Running]:
    """A bootstrap peer."""
    running = start("bootstrap", until="listening")
    yield running
    assert running.end_with(signal.SIGINT).returncode == 0


def test_status_shows_every_server_and_exits_0_when_nothing_is_missing(address: str) -> None:
    result = run_here("status", "--join", address, "--json")

    (model,) = result.last_json()["models"]
    assert [(s["name"], s["blocks"], s["state"]) for s in model["servers"]] == [
        ("server-0", [0, 4], "online"),
        ("server-1", [4, 8], "online"),
    ]
    assert [(s["queue"], s["expected_wait_s"]) for s in model["servers"]] == [(0, 0.0), (0, 0.0)]
    assert model["missing"] == []
    assert result.returncode == 0


def test_watching_prints_a_line_for_each_look_until_ctrl_c(address: str) -> None:
    watching = start("status", "--watch", "--every", "0.2", "--join", address, until="looked")
    assert watching.process.stdout is not None
    second = json.loads(watching.process.stdout.readline())
    assert [model["model"] for model in second["models"]] == ["tiny-chat"]
    assert watching.end_with(signal.SIGINT).returncode == 0


def test_status_draws_a_table_for_people(address: str) -> None:
    result = run_here("status", "--join", address)

    assert "tiny-chat · 8 blocks" in result.stdout
    assert "████" in result.stdout
    assert "would stop if one of these left: server-0 0:4, server-1 4:8" in result.stdout


def test_route_tells_the_servers_and_what_to_expect(address: str) -> None:
    result = run_here("route", "tiny-chat", "--join", address, "--json")

    report = result.last_json()
    assert [
        (hop["facts"]["label"], hop["facts"]["start"], hop["facts"]["stop"]) for hop in report["hops"]
    ] == [
        ("server-0", 0, 4),
        ("server-1", 4, 8),
    ]
    assert report["forecast"]["tokens_per_s"] > 0


def test_route_explains_itself_to_people(address: str) -> None:
    result = run_here("route", "tiny-chat", "--join", address, "--explain")

    said = " ".join(result.stdout.split())
    for words in (
        "nobody else has these blocks",
        "Expect",
        "The bottleneck is",
        "One more server",
        "This machine",
    ):
        assert words in said


def test_generate_answers_over_the_swarm(address: str) -> None:
    result = run_here("generate", "tiny-chat", "What is 2 + 3?", "--join", address, "--json")

    answer = result.last_json()
    assert "5" in answer["answer"]
    assert answer["route"] == ["server-0 [0:4]", "server-1 [4:8]"]


def test_chat_answers_line_by_line_and_ends_with_its_input(address: str) -> None:
    result = run_here("chat", "--join", address, stdin="What is 2 + 3?\n/route\n/quit\n")

    assert "5" in result.stdout
    assert "server-0" in result.stdout
    assert result.returncode == 0


def test_a_server_that_is_told_to_leave_says_so_and_disappears_from_the_swarm(meeting_point: Running) -> None:
    join = ("--join", meeting_point.address)
    server = start("serve", "tiny-chat", "--blocks", "0:2", *join, until="serving_started")
    children = server.children

    ended = server.end_with(signal.SIGTERM)

    models = run_here("status", *join, "--json").last_json()["models"]
    states = {s["peer_id"]: s["state"] for model in models for s in model["servers"]}
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    events = [json.loads(line)["event"] for line in ended.stdout.splitlines()]
    assert events == ["drain_started", "server_left"]
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert states.get(server.event["owner"]["peer_id"], "leaving") == "leaving"


@pytest.mark.slow
def test_generate_without_a_swarm_makes_one_of_its_own() -> None:
    result = run_here("generate", "tiny-chat", "What is 2 + 3?", "--json")

    assert "5" in result.last_json()["answer"]


def test_the_demo_kills_a_server_and_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("PYTEST_SWARM_MARK", mark)  # all that is started inherits it
    before = set(psutil.Process().children(recursive=True))

    result = run_here("demo", "--json")

    told = result.last_json()
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
    # From outside, a copy's environment looks like the fork server's.
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.is_running() and process.status() != "zombie"]


AT_ONCE = (("status",), "give --join ADDRESS")
"""A mistake that is seen before anything is imported that takes seconds."""
MISTAKES: list[Any] = [
    (("generate", "no-such-model", "Hi"), "no-such-model"),
    (("serve", "tiny-chat", "--blocks", "7:12"), "not inside this model's 0:8"),
    (("serve", "tiny-chat", "--blocks", "many"), "blocks are written A:B"),
    AT_ONCE,
    (("status", "--join", "/ip4/127.0.0.1/tcp/9/p2p/nobody"), "nobody"),
    (("bench", "decode", "--stages", "one"), "as in 1,2,4"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_a_mistake_gets_one_clear_line_and_exit_code_1(arguments: tuple[str, ...], said: str) -> None:
    result = run_here(*arguments)

    assert result.returncode == 1
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [pytest.param(*mistake, marks=() if mistake is AT_ONCE else pytest.mark.slow) for mistake in MISTAKES],
)
def test_a_process_ends_with_one_clear_line_and_exit_code_1(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)

    assert result.returncode == 1
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
