"""What holds for every test."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress

import hypothesis
import platformdirs
import psutil
import pytest

from swarmkit.local import fork_server

from .cli import commands
from .waiting import wait_until

THROUGHPUT = "SWARMKIT_SERVER_THROUGHPUT"

LONGEST_FIRST = (
    "test_virtual_swarm.py",
    "client/test_kill_processes.py",
    "test_local_swarm.py",
    "server/test_no_leaks.py",
    "test_fork_server.py",
    "cli/test_commands.py",
    "test_local_links.py",
    "client/test_crowd_of_strangers.py",
    "test_private_swarm.py",
    "app/test_playground.py",
    "client/test_kill_in_training.py",
    "net/test_hivemind_transport.py",
    "models/test_check.py",
    "models/test_equality.py",
    "client/test_recovery.py",
)
"""Workers take files in order, so that none of these, which take longest, is left to one at the end."""

# Else an example that takes more than 0.2 s fails, as one does now and then where other programs are at work.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
# A change is judged by the same examples each time; `--hypothesis-profile untimed` looks for new ones.
hypothesis.settings.register_profile(
    "same", parent=hypothesis.settings.get_profile("untimed"), derandomize=True
)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def kept_fork_server() -> Iterator[None]:
    """Keep the process's fork server for all tests that need one: to start one takes seconds of work."""
    others = set(psutil.Process().children())
    with fork_server.shared() as server:
        its = set(psutil.Process().children()) - others
        commands.kept[:] = [server] if server is not None else []
        yield
        commands.kept.clear()
    assert not any(process.is_running() for process in its)
    assert "swarmkit-fork-server" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Keep what the package remembers of files and architectures out of the user's cache folder.

    The folder lies among pytest's own and stays, because a check of an architecture takes seconds. What other
    libraries keep, such as fonts and downloads, is used where it is.
    """
    cache = getattr(pytestconfig, "cache", None)  # there is none with `-p no:cacheprovider`
    own = tmp_path_factory.mktemp("cache") if cache is None else cache.mkdir("user-cache")
    users = platformdirs.user_cache_path()
    for other in users.iterdir() if users.is_dir() else ():
        if other.name != "swarmkit" and not (own / other.name).exists():
            with suppress(FileExistsError):  # another worker was quicker
                (own / other.name).symlink_to(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own))
        yield


@pytest.fixture(scope="session", autouse=True)
def state_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what commands remember, such as a meeting point's identity, out of the user's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def pytest_configure() -> None:
    """Hear Ctrl-C, which some tests press, even if the tests run in the background, where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Servers announce this rather than measure themselves, but for a test that takes the variable away.
    os.environ.setdefault(THROUGHPUT, "100")
    # Second opinions come at random; tests that are about them set their share.
    os.environ.setdefault("SWARMKIT_CLIENT_CHECK_SHARE", "0")
    # Compilers would run beside the tests, for servers that end before they are done.
    os.environ.setdefault("SWARMKIT_SERVER_COMPILE", "off")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave all that is imported and collected out of the search for garbage, now and later.

    It is a million objects that stay. To walk them took a quarter of the time in which tests are collected,
    half a second whenever a test asks for a collection, and several seconds at the end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave all else in its order."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}

    def place(item: pytest.Item) -> int:
        path = item.nodeid.partition("::")[0].removeprefix("tests/")
        return places.get(path, len(places))

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="module")
def no_loop_stays() -> Iterator[None]:
    """Each file ends what it starts: the background loop's thread would disturb the next file's tests."""
    yield

    def has_ended() -> bool:
        return "swarmkit-loop" not in {thread.name for thread in threading.enumerate()}

    if not has_ended():
        gc.collect()  # models and swarms that only cycles of references still hold
        wait_until(has_ended, "the end of the background loop", within=20)
