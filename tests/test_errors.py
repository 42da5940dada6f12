"""One tree of errors, drawn where it is defined."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import swarmkit
from swarmkit import errors
from swarmkit.errors import (
    NoRouteError,
    PeerError,
    RemoteError,
    SwarmkitError,
    UsageError,
)

MODULES = [
    module.name
    for module in pkgutil.walk_packages(swarmkit.__path__, "swarmkit.")
    if not module.name.endswith("__main__")
]


def exceptions_in(module: str) -> list[type[Exception]]:
    found = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    return [cls for _, cls in found if issubclass(cls, Exception) and cls.__module__ == module]


def drawn_tree() -> dict[str, str]:
    """Every error in the drawing at the top of `errors.py`, and the one above it."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if not (match := re.match(r"    [│├└─ ]*(\w+Error)\b", line)):
            continue
        column, name = match.start(1), match.group(1)
        above = [(depth, other) for depth, other in above if depth < column]
        parents[name] = above[-1][1] if above else "Exception"
        above.append((column, name))
    return parents


@pytest.mark.parametrize("module", MODULES)
def test_every_public_exception_is_a_swarmkit_error(module: str) -> None:
    strangers = [
        cls
        for cls in exceptions_in(module)
        if not cls.__name__.startswith("_") and not issubclass(cls, SwarmkitError)
    ]
    assert strangers == []


def test_the_tree_is_drawn_as_it_is() -> None:
    own = {cls.__name__: cls.__bases__[0].__name__ for cls in exceptions_in("swarmkit.errors")}
    assert drawn_tree() == own


def test_a_callers_mistake_is_never_taken_for_a_peers_fault() -> None:
    assert not issubclass(UsageError, PeerError)
    assert not issubclass(PeerError, UsageError)


def test_a_callers_mistake_is_a_value_error_as_well() -> None:
    assert issubclass(UsageError, ValueError)


@pytest.mark.parametrize("cls", exceptions_in("swarmkit.errors"), ids=lambda cls: cls.__name__)
def test_every_error_can_be_raised_with_its_message_alone(cls: type[Exception]) -> None:
    assert str(cls("what and what next")) == "what and what next"


def test_an_error_of_a_peer_knows_which() -> None:
    assert RemoteError("no", "peer", "busy").peer_id == "peer"


def test_a_fault_knows_its_code() -> None:
    assert RemoteError("no", "peer", "busy").code == "busy"


def test_a_missing_route_knows_the_blocks() -> None:
    assert NoRouteError("nobody", [(0, 2), (4, 6)]).missing == ((0, 2), (4, 6))


def test_files_of_ours_under_another_projects_package_say_so(tmp_path: Path) -> None:
    foreign = tmp_path / "swarmkit" / "__init__.py"
    foreign.parent.mkdir()
    foreign.write_text(f"__path__.append({swarmkit.__path__[0]!r})\n")
    done = subprocess.run(
        [sys.executable, "-c", "import swarmkit.cli"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "pip uninstall -y swarmkit" in done.stderr
    assert done.returncode == 1
