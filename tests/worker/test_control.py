"""The local control API answers programs of the same person, and nobody else."""

from __future__ import annotations

import http.client
import json
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from swarmkit.errors import UsageError
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.handle import Handle, NoWorkerError
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.settings import WorkerSettings
from tests.worker.worlds import AWAY, RunningWorker

Start = Callable[..., RunningWorker]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def handle(over_loopback: RunningWorker) -> Handle:
    return Handle.read(over_loopback.places.handle)


def ask(
    handle: Handle,
    *,
    method: str = "GET",
    path: str = "/v1/status",
    body: bytes | None = None,
    token: str | None = None,
    **headers: str,
) -> int:
    """Send one request over loopback as a program of the person would, but for what is given; its status."""
    connection = http.client.HTTPConnection("127.0.0.1", handle.port, timeout=10)
    given = {"Host": f"127.0.0.1:{handle.port}", "Authorization": f"Bearer {token or handle.token}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {name: value for name, value in given.items() if value})
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_program_of_the_person_is_answered(handle: Handle) -> None:
    assert ask(handle) == 200


STRANGERS = {
    "no token": {"Authorization": ""},
    "a wrong token": {"token": "x" * 43},
    "the token as a password": {"Authorization": "Basic {token}"},
    "the token in the address only": {"Authorization": "", "path": "/v1/status?token={token}"},
    "a page of another site": {"Origin": "https://example.org"},
    "a page without an origin": {"Origin": "null"},
    "a page of another program on this computer": {"Origin": "http://127.0.0.1:8080"},
    "a page that claims our own address": {"Origin": "http://127.0.0.1:{port}"},
    "a link that was clicked in a browser": {"Sec_Fetch_Site": "cross-site"},
    "a name that was made to point here": {"Host": "example.org:{port}"},
    "another port": {"Host": "127.0.0.1:1"},
    "this computer's name": {"Host": "localhost.example.org:{port}"},
    "the Unix socket's name over loopback": {"Host": "swarmkit-worker"},
    "a form of a page": {
        "method": "POST",
        "path": "/v1/resume",
        "body": b"a=b",
        "Content_Type": "text/plain",
    },
    "a body without a kind": {"method": "POST", "path": "/v1/resume", "body": b"{}"},
    "a body without end": {
        "method": "POST",
        "path": "/v1/pause",
        "body": b" " * 100_000,
        "Content_Type": "application/json",
    },
    "a request before a request": {
        "method": "OPTIONS",
        "Origin": "https://example.org",
        "Access_Control_Request_Method": "POST",
    },
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_refused(handle: Handle, stranger: dict[str, object]) -> None:
    filled = {
        name: value.format(token=handle.token, port=handle.port) if isinstance(value, str) else value
        for name, value in stranger.items()
    }
    assert ask(handle, **filled) in (401, 403, 413, 415, 421)  # type: ignore[arg-type]


def raw(handle: Handle, text: bytes) -> bytes:
    """Send bytes as they are, and return the first line of the answer."""
    with socket.create_connection(("127.0.0.1", handle.port), timeout=10) as connection:
        connection.sendall(text)
        return connection.makefile("rb").readline()


def test_a_request_without_a_host_is_refused(handle: Handle) -> None:
    asked = f"GET /v1/status HTTP/1.0\r\nAuthorization: Bearer {handle.token}\r\n\r\n"
    assert b" 421 " in raw(handle, asked.encode())


def test_two_tokens_of_which_one_is_right_are_refused(handle: Handle) -> None:
    asked = (
        f"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1:{handle.port}\r\n"
        f"Authorization: Bearer {handle.token}\r\nAuthorization: Bearer guess\r\n\r\n"
    )
    assert b" 401 " in raw(handle, asked.encode())


def test_a_websocket_is_refused(handle: Handle) -> None:
    asked = (
        f"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1:{handle.port}\r\nOrigin: http://evil\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nAuthorization: Bearer {handle.token}\r\n\r\n"
    )
    assert b" 403 " in raw(handle, asked.encode())


def test_a_body_in_chunks_that_is_too_large_is_refused(handle: Handle) -> None:
    head = (
        f"POST /v1/pause HTTP/1.1\r\nHost: 127.0.0.1:{handle.port}\r\nTransfer-Encoding: chunked\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {handle.token}\r\n\r\n"
    )
    chunks = (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 5 + b"0\r\n\r\n"
    assert b" 413 " in raw(handle, head.encode() + chunks)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nobody_else_can_read_the_token_or_reach_the_socket(worker: RunningWorker) -> None:
    places = worker.places
    assert places.socket is not None
    modes = [mode_of(path) for path in (places.runtime, places.handle, places.socket)]
    assert modes == [0o700, 0o600, 0o600]


def test_a_token_that_others_could_have_written_is_not_believed(worker: RunningWorker) -> None:
    worker.places.handle.chmod(0o666)
    with pytest.raises(UsageError, match="not private"):
        worker.client.status()


def test_a_folder_for_the_token_that_others_may_enter_is_not_used(places: WorkerPlaces) -> None:
    places.runtime.mkdir(parents=True, mode=0o755)
    places.runtime.chmod(0o755)
    with pytest.raises(UsageError, match="not private"):
        places.make()


def test_without_a_worker_the_client_says_how_to_start_one(places: WorkerPlaces) -> None:
    with pytest.raises(NoWorkerError, match="swarmkit worker run"):
        WorkerClient(places).status()


def test_nothing_of_the_control_api_is_left_when_the_worker_has_ended(worker: RunningWorker) -> None:
    worker.close()
    names = {path.name for path in worker.places.runtime.iterdir()}
    assert names <= {"worker.lock"}


# requests


def test_a_new_worker_is_paused_and_says_why(worker: RunningWorker) -> None:
    status = worker.status()
    assert (status.state, status.words) == ("paused", "Paused: you have not chosen yet to lend this computer")


def test_settings_are_changed_one_by_one(worker: RunningWorker) -> None:
    worker.client.change_settings({"rules": {"on_battery": True}})
    settings = worker.client.settings()
    assert (settings.rules.on_battery, settings.rules.on_metered) == (True, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"rules": {"on_batery": True}},
        {"limits": {"cpu_cores": {"in_use": 0}}},
        {"limits": {"upload_bytes_per_s": {"away": "fast"}}},
        {"rules": {"schedule": {"monday": "#"}}},
        {"agreed": None},
    ],
)
def test_settings_that_are_not_allowed_are_refused_with_their_name(
    worker: RunningWorker, changes: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match=r"`\$|agreed|on_batery"):
        worker.client.change_settings(changes)
    assert worker.client.settings() == WorkerSettings()


def test_the_schema_describes_every_setting(worker: RunningWorker) -> None:
    schema = worker.client.settings_schema()
    described = schema["$defs"]["WorkerLimits"]["properties"]
    assert all("description" in json.dumps(value) for value in described.values())


def test_a_pause_holds_until_it_is_resumed(worker: RunningWorker) -> None:
    worker.client.pause("seconds", 3600.0)
    paused = worker.status().pause
    assert paused is not None
    assert worker.client.resume().pause is None


def test_two_trays_do_not_share_a_lease(worker: RunningWorker) -> None:
    worker.client.renew_lease("one", AWAY)
    with pytest.raises(UsageError, match="another tray"):
        worker.client.renew_lease("two", AWAY)


def test_a_tray_that_ends_makes_room_for_another(worker: RunningWorker) -> None:
    worker.client.renew_lease("one", AWAY)
    worker.client.release_lease("one")
    assert worker.client.renew_lease("two", AWAY).seconds > 0


def connections_to(handle: Handle) -> set[int]:
    """The ports of those who are connected."""
    seen = psutil.Process().net_connections("tcp")
    return {one.laddr.port for one in seen if one.raddr and one.raddr.port == handle.port}


def test_a_tray_renews_its_lease_over_one_connection(over_loopback: RunningWorker, handle: Handle) -> None:
    with over_loopback.client.keep_lease("tray") as lease:
        lease.renew(AWAY)
        first = connections_to(handle)
        lease.renew(AWAY)
        assert (len(first), connections_to(handle)) == (1, first)


def test_a_tray_that_outlives_the_worker_finds_the_next_one(start: Start) -> None:
    first = start()
    with first.client.keep_lease("tray") as lease:
        lease.renew(AWAY)
        first.close()
        with pytest.raises(NoWorkerError):
            lease.renew(AWAY)
        second = start()
        lease.renew(AWAY)
    assert second.status().lease is not None


def test_a_connection_that_is_kept_needs_the_token_for_each_request(handle: Handle) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", handle.port, timeout=10)
    statuses = []
    for token in (handle.token, "guess", handle.token):
        connection.request("GET", "/v1/status", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    assert statuses == [200, 401, 200]


def test_what_happens_can_be_followed(worker: RunningWorker) -> None:
    with worker.client.events() as events:
        assert next(events)["event"] == "status"
        worker.client.pause()
        worker.client.change_settings({"agreed": True, "serve": {"model": "quick"}})
        kinds = {next(events)["event"] for _ in range(2)}
    assert kinds <= {"worker_state_changed", "worker_settings_changed"}


@pytest.mark.parametrize("path", ["/v1/history?days=0", "/v1/history?days=x", "/v1/log?lines=-1", "/v1/none"])
def test_what_is_asked_wrongly_is_answered_with_a_sentence(handle: Handle, path: str) -> None:
    assert ask(handle, path=path) in (400, 404)


def test_belongings_name_every_file(worker: RunningWorker) -> None:
    paths = {part.path for part in worker.client.belongings().parts}
    assert {str(path) for path in worker.places.state.iterdir()} <= paths


def test_the_client_needs_no_heavy_library() -> None:
    code = "import swarmkit.worker.control.client, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "transformers", "hivemind", "numpy", "pydantic", "starlette", "anyio"}
    assert heavy & {name.split(".")[0] for name in loaded} == set()
