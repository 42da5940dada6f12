"""Ctrl-C in the first seconds of a command ends it at once, with the exit code of shells and no traceback."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .commands import SWARMKIT, TIMEOUT_S, Ended, run, start

SERVE = ("serve", "tiny-chat", "--blocks", "0:1", "--json")
GENERATE = ("generate", "tiny-chat", "Tell me a story about a fox.", "--max-new-tokens", "4000")
Moment = tuple[tuple[str, ...], float]
MOMENTS = ((SERVE, 0.5), (SERVE, 3.0), (GENERATE, 1.0))
MORE_MOMENTS = ((SERVE, 0.2), (SERVE, 1.5), (GENERATE, 0.3), (GENERATE, 3.0))


BEGIN = "import swarmkit.cli; print('begun', flush=True); swarmkit.cli.main()"
"""What the installed command does. Before this, Ctrl-C meets Python itself."""


def interrupted(moments: tuple[Moment, ...]) -> dict[Moment, Ended]:
    """Let commands begin together, each of which has Ctrl-C at its moment."""
    processes = {
        moment: subprocess.Popen(
            [sys.executable, "-c", BEGIN, *moment[0]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
            start_new_session=True,
        )
        for moment in moments
    }
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
    began = time.monotonic()
    for (_, after_s), process in sorted(processes.items(), key=lambda item: item[0][1]):
        time.sleep(max(0.0, began + after_s - time.monotonic()))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    ended = {}
    for moment, process in processes.items():
        out, err = process.communicate(timeout=TIMEOUT_S)
        ended[moment] = Ended(process.returncode, out, err)
    return ended


@pytest.fixture(scope="module")
def interrupted_together() -> Callable[[tuple[Moment, ...]], dict[Moment, Ended]]:
    """The same for all tests that ask for the same moments."""
    return functools.cache(interrupted)


@pytest.mark.parametrize(
    "moment",
    [*MOMENTS, *(pytest.param(moment, marks=pytest.mark.slow) for moment in MORE_MOMENTS)],
    ids=lambda moment: f"{moment[0][0]}-{moment[1]}s",
)
def test_an_early_ctrl_c_ends_a_command_at_once(
    interrupted_together: Callable[[tuple[Moment, ...]], dict[Moment, Ended]], moment: Moment
) -> None:
    ended = interrupted_together(MOMENTS if moment in MOMENTS else MORE_MOMENTS)[moment]
    assert "Traceback" not in ended.stderr
    # A server that serves already, as on a fast machine, leaves in order.
    served = "serving_started" in ended.stdout
    assert ended.returncode == (0 if served else 130)


def test_ctrl_c_in_the_middle_of_an_answer_ends_the_command_without_a_traceback() -> None:
    process = subprocess.Popen(
        [*SWARMKIT, *GENERATE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the first letter of the answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, b"Traceback" in err) == (130, False)


def test_ctrl_c_lets_a_meeting_point_leave_in_order() -> None:
    ended = start("bootstrap", until="listening").end_with(signal.SIGINT)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("path", ["/proc/none/identity", "{file}/identity", "{folder}"])
def test_an_identity_that_cannot_be_kept_is_told_in_one_line(path: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    ended = run("bootstrap", "--identity", path.format(file=file, folder=tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.startswith("error the identity file ")
    assert "Traceback" not in ended.stderr
