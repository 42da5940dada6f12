"""The place of a process's session among others, which Linux asks before it asks how nice a process is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from swarmkit.worker.process_tree import end_tree
from tests.sessions import grouped_by_sessions, session_nice
from tests.waiting import WITHIN

pytestmark = grouped_by_sessions

NICE = 15
PROGRAM = f"""
from swarmkit.session_nice import set_session_nice
set_session_nice({NICE})
print("ready", flush=True)
input()
"""


@contextmanager
def nice_program(*, leads: bool) -> Iterator[int]:
    """A program that has made its session nice, and waits."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=leads,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        try:
            yield program.pid
        finally:
            program.kill()
            program.wait(WITHIN)


def test_a_process_with_a_session_of_its_own_puts_it_after_others() -> None:
    with nice_program(leads=True) as pid:
        assert session_nice(pid).endswith(f" nice {NICE}")


def test_a_process_in_the_session_of_others_leaves_that_as_it_is() -> None:
    before = session_nice("self")
    with nice_program(leads=False) as pid:
        assert session_nice(pid) == session_nice("self") == before


def test_a_session_that_is_to_end_gets_its_share_of_the_processors_again() -> None:
    with nice_program(leads=True) as pid:
        end_tree(pid)
        assert session_nice(pid).endswith(" nice 0")  # it has ended, and is not waited for yet
