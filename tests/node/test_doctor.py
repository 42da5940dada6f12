"""What `swarmkit doctor` says of a machine, as it follows from what was found there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swarmkit.errors import DaemonStartError, StartCause, TransportError
from swarmkit.node.doctor import Facts, Finding, Reach, examine
from swarmkit.sizes import GIB

from ..cli.commands import run_here

WELL = Facts(
    python=(3, 11),
    libraries={"torch": "2.13.0", "hivemind": "1.1.12"},
    files=4096,
    memory_bytes=16 * GIB,
    total_memory_bytes=32 * GIB,
    disk_bytes=100 * GIB,
    disk_folder="/models",
    addresses=("/ip4/192.0.2.7/tcp/31337/p2p/x",),
    joined=True,
    reach=Reach(ports=(31337,), asked=2, reached=(31337,), seen_at=("192.0.2.7",)),
)


def finding(name: str, **changes: Any) -> Finding:
    (found,) = [each for each in examine(replace(WELL, **changes)) if each.name == name]
    return found


def test_all_is_well_with_a_good_machine() -> None:
    assert {each.state for each in examine(WELL)} == {"ok", "unknown"}


@pytest.mark.parametrize(
    ("name", "changes", "state", "advice"),
    [
        ("versions", {"libraries": {"torch": None}}, "failure", "pip install torch"),
        ("versions", {"python": (3, 9)}, "failure", "Python 3.10"),
        ("files", {"files": 256}, "warning", "ulimit -n"),
        ("files", {"files": None}, "ok", ""),
        ("memory", {"memory_bytes": GIB}, "warning", "fewer blocks"),
        ("disk", {"disk_bytes": 5 * GIB}, "warning", "SWARMKIT_STORE_DIR"),
        ("disk", {"disk_bytes": GIB // 2}, "failure", "SWARMKIT_STORE_DIR"),
        ("disk", {"disk_bytes": None}, "failure", "SWARMKIT_STORE_DIR"),
        ("gpu", {"gpus": ("a GPU",)}, "ok", "--device"),
        ("gpu", {"has_driver": True}, "warning", "PyTorch"),
        ("clock", {"clock_error_s": 3600.0}, "warning", "NTP"),
        ("clock", {"joined": False}, "unknown", ""),
        ("swarm", {"joined": False}, "unknown", "--join"),
        ("reachability", {"reach": None}, "unknown", "--join"),
        ("reachability", {"reach": Reach((31337,), 2)}, "warning", "--relay"),
        ("reachability", {"reach": Reach((31337,), 0)}, "unknown", "--join"),
        ("relay", {"reach": Reach((31337,), 2)}, "warning", "swarmkit bootstrap"),
        ("relay", {"reach": Reach((31337,), 2, relays=("/x/p2p-circuit/y",))}, "ok", "--relay"),
    ],
)
def test_each_finding_says_what_to_do(name: str, changes: dict[str, Any], state: str, advice: str) -> None:
    found = finding(name, **changes)
    assert (found.state, advice in found.advice) == (state, True)


@pytest.mark.parametrize(
    ("cause", "failing"),
    [
        *((cause, "ports") for cause in ("port", "forbidden", "program", "files")),
        *((cause, "swarm") for cause in ("peers", "firewall", "network", "proxy")),
    ],
)
def test_a_daemon_that_does_not_start_fails_one_line(cause: StartCause, failing: str) -> None:
    error = DaemonStartError("it failed\nwith many words", cause)
    found = examine(replace(WELL, start_error=error, reach=None))
    assert [(each.name, each.found) for each in found if each.state == "failure"] == [(failing, "it failed")]


def test_a_swarm_that_refuses_this_peer_fails() -> None:
    found = examine(replace(WELL, start_error=TransportError("it is private"), reach=None))
    assert [each.found for each in found if each.state == "failure"] == ["it is private"]


def test_a_clock_that_is_late_is_told_so() -> None:
    assert "30 s late" in finding("clock", clock_error_s=30.0).found


def test_the_command_looks_at_this_machine() -> None:
    ended = run_here("doctor", "--host", "127.0.0.1", "--json")
    found = {each["name"]: each["state"] for each in ended.last_json()["findings"]}
    assert (found["ports"], found["versions"], found["swarm"]) == ("ok", "ok", "unknown")
    assert ended.returncode == (1 if "failure" in found.values() else 2 if "warning" in found.values() else 0)


def test_the_command_names_a_port_that_is_taken() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_here("doctor", "--host", "127.0.0.1", "--port", port, "--json")
    (ports,) = [each for each in ended.last_json()["findings"] if each["name"] == "ports"]
    assert (ended.returncode, ports["state"], "in use" in ports["found"]) == (1, "failure", True)
