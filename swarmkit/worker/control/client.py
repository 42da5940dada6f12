"""`WorkerClient`: ask a worker, and tell it what to do. Needs neither torch nor an event loop."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec

from swarmkit.errors import UsageError
from swarmkit.worker.control.access import UNIX_HOST
from swarmkit.worker.control.handle import Handle, NoWorkerError
from swarmkit.worker.control.values import (
    Belongings,
    Day,
    LeaseGranted,
    LeaseRequest,
    Stats,
    Status,
)
from swarmkit.worker.pause import Haste, PauseRequest, Until
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.settings import WorkerSettings
from swarmkit.worker.signals import SessionSignals

T = TypeVar("T")

_DISK_IS_FULL = 507

_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (Status, WorkerSettings, Stats, list[Day], Belongings, LeaseGranted, list[str], dict)
}
"""Made here, by one thread: two that were the first to decode a kind, at the same moment, crashed msgspec."""


class WorkerClient:
    """The worker of this person on this computer. Each call is one request on a connection of its own, but
    for those of `keep_lease`.

    All methods raise `NoWorkerError` where no worker answers, and `UsageError` with the worker's own words
    where it refuses what was asked.
    """

    def __init__(self, places: WorkerPlaces | None = None, timeout_s: float = 5.0) -> None:
        self._places = places or WorkerPlaces.of_this_person()
        self._timeout_s = timeout_s

    @property
    def runs(self) -> bool:
        """Whether a worker answers."""
        try:
            self.status()
        except NoWorkerError:
            return False
        return True

    def status(self) -> Status:
        """What the worker does, and why."""
        return self._get("/v1/status", Status)

    def settings(self) -> WorkerSettings:
        """What the person has chosen."""
        return self._get("/v1/settings", WorkerSettings)

    def settings_schema(self) -> dict[str, Any]:
        """The JSON schema of the settings, with descriptions, bounds and defaults."""
        return self._get("/v1/settings/schema", dict)

    def change_settings(self, changes: Mapping[str, Any]) -> WorkerSettings:
        """Replace some settings, such as `{"rules": {"on_battery": True}}`; returns all that hold now."""
        return self._send("PATCH", "/v1/settings", changes, WorkerSettings)

    def pause(
        self, until: Until = "resumed", seconds: float | None = None, haste: Haste = "prompt"
    ) -> Status:
        """Pause; see `PauseRequest`."""
        request = PauseRequest(until=until, seconds=seconds, haste=haste)
        return self._send("POST", "/v1/pause", msgspec.to_builtins(request), Status)

    def resume(self) -> Status:
        """End the person's own pause. The worker serves where the rules allow."""
        return self._send("POST", "/v1/resume", {}, Status)

    def stop(self) -> None:
        """End the worker itself, after the sessions have moved away."""
        self._send("POST", "/v1/stop", {}, dict)

    def stats(self) -> Stats:
        """What was contributed today, this month, and in all."""
        return self._get("/v1/stats", Stats)

    def history(self, days: int = 30) -> list[Day]:
        """What was contributed on each of the last days, the oldest first; days without anything too."""
        return self._get("/v1/history?" + urlencode({"days": days}), list[Day])

    def log(self, lines: int = 200) -> list[str]:
        """The last lines of the log."""
        return self._get("/v1/log?" + urlencode({"lines": lines}), list[str])

    def belongings(self) -> Belongings:
        """What the worker has put on this computer: paths and sizes."""
        return self._get("/v1/belongings", Belongings, timeout_s=60.0)

    def renew_lease(self, holder: str, signals: SessionSignals) -> LeaseGranted:
        """Say that the person's tray is there, and what it senses; again before the lease ends.

        Raises:
            UsageError: another tray holds the lease.
        """
        with self.keep_lease(holder) as lease:
            return lease.renew(signals)

    def keep_lease(self, holder: str) -> KeptLease:
        """Return what renews a lease again and again over one connection, for one thread at a time."""
        return KeptLease(self._places, holder, self._timeout_s)

    def release_lease(self, holder: str) -> None:
        """Say that the tray ends."""
        self._send("DELETE", "/v1/lease?" + urlencode({"holder": holder}), None, dict)

    @contextmanager
    def events(self, silence_s: float = 60.0) -> Iterator[Iterator[dict[str, Any]]]:
        """Follow what happens, as JSON objects whose `event` names their kind; the first one is a `status`.

        The worker says something every 15 s at the latest, which is left out here.

        Args: silence_s: after so many seconds without a word the worker counts as gone.
        """
        handle = self._handle()
        connection = _connection(handle, silence_s)
        try:
            with _asking(handle):
                connection.request("GET", "/v1/events", headers=_headers(handle))
                answer = connection.getresponse()
            if answer.status != 200:
                raise _error(answer.status, answer.read())
            yield _objects(answer)
        finally:
            connection.close()

    # ------------------------------------------------------------------ requests

    def _get(self, path: str, kind: type[T], timeout_s: float | None = None) -> T:
        return self._send("GET", path, None, kind, timeout_s)

    def _send(self, method: str, path: str, body: Any, kind: type[T], timeout_s: float | None = None) -> T:
        handle = self._handle()
        connection = _connection(handle, timeout_s or self._timeout_s)
        data = None if body is None else msgspec.json.encode(body)
        try:
            with _asking(handle):
                status, text = _exchange(connection, handle, method, path, data)
        finally:
            connection.close()
        return _value(status, text, kind)

    def _handle(self) -> Handle:
        return Handle.read(self._places.handle)


class KeptLease:
    """A tray's lease, renewed over one connection that is kept: opening one is most of what a request costs.

    A connection that has ended, as it does with the worker, is opened again once for each renewal.
    """

    def __init__(self, places: WorkerPlaces, holder: str, timeout_s: float) -> None:
        self._places, self._holder, self._timeout_s = places, holder, timeout_s
        self._kept: tuple[Handle, http.client.HTTPConnection] | None = None

    def __enter__(self) -> KeptLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def renew(self, signals: SessionSignals) -> LeaseGranted:
        """See `WorkerClient.renew_lease`."""
        data = msgspec.json.encode(LeaseRequest(holder=self._holder, signals=signals, pid=os.getpid()))
        if self._kept is not None:
            try:
                return self._ask(*self._kept, data)
            except NoWorkerError:
                self.close()  # it may be another worker that answers now
        handle = Handle.read(self._places.handle)
        self._kept = handle, _connection(handle, self._timeout_s)
        try:
            return self._ask(*self._kept, data)
        except NoWorkerError:
            self.close()
            raise

    def close(self) -> None:
        """End the connection. The lease holds until it ends by itself; a later renewal connects again."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None

    @staticmethod
    def _ask(handle: Handle, connection: http.client.HTTPConnection, data: bytes) -> LeaseGranted:
        with _asking(handle):
            status, text = _exchange(connection, handle, "POST", "/v1/lease", data)
        return _value(status, text, LeaseGranted)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__(UNIX_HOST, timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(handle: Handle, timeout_s: float) -> http.client.HTTPConnection:
    if handle.socket:
        return _UnixConnection(handle.socket, timeout_s)
    return http.client.HTTPConnection("127.0.0.1", handle.port, timeout=timeout_s)


def _headers(handle: Handle) -> dict[str, str]:
    host = UNIX_HOST if handle.socket else f"127.0.0.1:{handle.port}"
    return {"Host": host, "Authorization": f"Bearer {handle.token}"}


def _exchange(
    connection: http.client.HTTPConnection, handle: Handle, method: str, path: str, data: bytes | None
) -> tuple[int, bytes]:
    """Send a request, and return the status and the body of the answer."""
    headers = _headers(handle)
    if data is not None:
        headers["Content-Type"] = "application/json"
    connection.request(method, path, body=data, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def _value(status: int, text: bytes, kind: type[T]) -> T:
    if status != 200:
        raise _error(status, text)
    value: T = _DECODERS[kind].decode(text)
    return value


@contextmanager
def _asking(handle: Handle) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise NoWorkerError(
            f"the worker (process {handle.pid}) does not answer: {error}. If it has ended, start it again "
            "with `swarmkit worker run`"
        ) from error


def _error(status: int, text: bytes) -> Exception:
    try:
        message = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"the worker answered with status {status}"
    return UsageError(message) if status < 500 or status == _DISK_IS_FULL else NoWorkerError(message)


def _objects(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    try:
        while line := answer.readline():
            if line.strip():
                yield json.loads(line)
    except (OSError, http.client.HTTPException) as error:
        raise NoWorkerError(f"the worker has ended: {error}") from error
