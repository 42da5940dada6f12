"""Questions over D-Bus from any thread. One connection to each bus is kept."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.worker.sensing.probes import LIMIT_S, TRUSTED_S, UnknownError

Bus = Literal["session", "system"]
SESSION: Bus = "session"
SYSTEM: Bus = "system"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_BUS = "org.freedesktop.DBus"
_BUS_PATH = "/org/freedesktop/DBus"


class DesktopBus:
    """Both buses, on an event loop in a thread of its own, which begins with the first question."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._connections: dict[Bus, Any] = {}
        self._names: tuple[Any, set[str]] = None, set()
        """The connection to the session's bus, and the names that it has told of."""
        self._followed: dict[tuple[Bus, str], _FollowedInterface] = {}

    def call(
        self, bus: Bus, name: str, path: str, interface: str, member: str, signature: str = "", *body: Any
    ) -> list[Any]:
        """Call a method and return its answer.

        Raises:
            UnknownError: there is no such bus or service, or it gives no answer.
        """
        message = name, path, interface, member, signature, list(body)
        return self._wait(bus, name, self._call(bus, *message)).body

    def call_with_files(
        self, bus: Bus, name: str, path: str, interface: str, member: str, signature: str = "", *body: Any
    ) -> list[int]:
        """Call a method that answers with open files, and return these. Raises: UnknownError."""
        message = name, path, interface, member, signature, list(body)
        return list(self._wait(bus, name, self._call(bus, *message)).unix_fds)

    def follow(self, bus: Bus, interface: str, member: str, act: Callable[[list[Any]], None]) -> None:
        """Call `act` with the values of each signal, on the bus's thread. Raises: UnknownError."""
        self._wait(bus, interface, self._follow(bus, interface, member, act))

    def property(self, bus: Bus, name: str, path: str, interface: str, member: str) -> Any:
        """Return the value of a property. Raises: UnknownError."""
        return self.call(bus, name, path, _PROPERTIES, "Get", "ss", interface, member)[0].value

    def followed_property(self, bus: Bus, name: str, path: str, interface: str, member: str) -> Any:
        """Return the value of a property of which the service tells when it changes. It is asked again then,
        and after `TRUSTED_S` in any case. Raises: UnknownError.
        """
        asked = name, path, member
        followed = self._followed.get((bus, interface))
        known = followed.values.get(asked) if followed is not None and followed.connection.connected else None
        if known is not None and self._clock.now() - known[1] < TRUSTED_S:
            return known[0]
        return self._wait(bus, name, self._ask_followed(bus, interface, asked))

    def names(self) -> set[str]:
        """Return the well-known names on the session's bus: of programs that run, not of those that could be
        started. The bus tells of changes, so that only the first time asks it. Raises: UnknownError.
        """
        connection, names = self._names
        if connection is None or not connection.connected:
            names = self._wait(SESSION, _BUS, self._follow_names())
        return set(names)

    def close(self) -> None:
        """Close both connections and end the thread."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for connection in self._connections.values():
            connection.disconnect()
        self._connections.clear()
        self._followed.clear()
        loop.close()

    def _wait(self, bus: Bus, name: str, question: Coroutine[Any, Any, Any]) -> Any:
        if not _may_exist(bus):
            question.close()
            raise UnknownError(f"there is no {bus} bus")
        future = asyncio.run_coroutine_threadsafe(question, self._started())
        try:
            return future.result(LIMIT_S)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise UnknownError(f"{name} does not answer") from None

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="swarmkit-dbus", daemon=True
                )
                self._thread.start()
            return self._loop

    async def _call(
        self, bus: Bus, name: str, path: str, interface: str, member: str, signature: str, body: list[Any]
    ) -> Any:
        connection = await self._connection(bus)
        from dbus_fast import Message, MessageType

        message = Message(
            destination=name, path=path, interface=interface, member=member, signature=signature, body=body
        )
        with contextlib.suppress(EOFError, OSError):
            answer = await connection.call(message)
            if answer is not None and answer.message_type != MessageType.ERROR:
                return answer
            raise UnknownError(f"{name} does not answer ({getattr(answer, 'error_name', 'nothing')})")
        raise UnknownError(f"the {bus} bus was lost")

    async def _follow(
        self, bus: Bus, interface: str, member: str, act: Callable[[list[Any]], None], arg0: str = ""
    ) -> None:
        connection = await self._connection(bus)
        from dbus_fast import MessageType

        def take(message: Any) -> None:
            is_signal = message.message_type == MessageType.SIGNAL
            if not is_signal or (message.interface, message.member) != (interface, member):
                return
            if not arg0 or message.body[:1] == [arg0]:
                act(message.body)

        connection.add_message_handler(take)
        rule = f"type='signal',interface='{interface}',member='{member}'"
        rule += f",arg0='{arg0}'" if arg0 else ""
        await self._call(bus, _BUS, _BUS_PATH, _BUS, "AddMatch", "s", [rule])

    async def _follow_names(self) -> set[str]:
        names: set[str] = set()

        def take(change: list[Any]) -> None:
            name, _, owner = change
            if not name.startswith(":"):
                (names.add if owner else names.discard)(name)

        await self._follow(SESSION, _BUS, "NameOwnerChanged", take)
        answer = await self._call(SESSION, _BUS, _BUS_PATH, _BUS, "ListNames", "", [])
        names.update(name for name in answer.body[0] if not name.startswith(":"))
        self._names = self._connections[SESSION], names
        return names

    async def _ask_followed(self, bus: Bus, interface: str, asked: tuple[str, str, str]) -> Any:
        connection = await self._connection(bus)
        followed = self._followed.get((bus, interface))
        if followed is None or followed.connection is not connection:
            followed = _FollowedInterface(connection)
            await self._follow(bus, _PROPERTIES, "PropertiesChanged", followed.forget, arg0=interface)
            self._followed[bus, interface] = followed
        name, path, member = asked
        at, changes = self._clock.now(), followed.changes
        answer = await self._call(bus, name, path, _PROPERTIES, "Get", "ss", [interface, member])
        value = answer.body[0].value
        if followed.changes == changes:  # else it may be what was so before
            followed.values[asked] = value, at
        return value

    async def _connection(self, bus: Bus) -> Any:
        try:
            from dbus_fast import BusType
            from dbus_fast.aio import MessageBus
        except ImportError:
            raise UnknownError("install the extra `worker` to ask the desktop") from None
        connection = self._connections.get(bus)
        if connection is None or not connection.connected:
            kind = BusType.SESSION if bus == "session" else BusType.SYSTEM
            try:
                connection = await MessageBus(bus_type=kind, negotiate_unix_fd=True).connect()
            except Exception as error:
                raise UnknownError(f"the {bus} bus cannot be reached: {error}") from error
            self._connections[bus] = connection
        return connection


class _FollowedInterface:
    """What the services on one connection have answered about an interface's properties."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.values: dict[tuple[str, str, str], tuple[Any, float]] = {}
        """By service, path and property: the value, and when it was asked for."""
        self.changes = 0

    def forget(self, _change: list[Any]) -> None:
        """Something has changed. Whose it is need not be known: all is asked again."""
        self.changes += 1
        self.values.clear()


_shared: list[DesktopBus] = []
_sharing = threading.Lock()


def desktop_bus() -> DesktopBus:
    """Return the process's own; `close_desktop_bus` ends it."""
    with _sharing:
        if not _shared:
            _shared.append(DesktopBus())
        return _shared[0]


def close_desktop_bus() -> None:
    """End the process's own, if there is one."""
    with _sharing:
        if _shared:
            _shared.pop().close()


def _may_exist(bus: Bus) -> bool:
    if bus == "session":
        return bool(os.environ.get("DBUS_SESSION_BUS_ADDRESS")) or os.path.exists(  # noqa: PTH110
            f"/run/user/{os.getuid()}/bus"
        )
    return bool(os.environ.get("DBUS_SYSTEM_BUS_ADDRESS")) or os.path.exists(  # noqa: PTH110
        "/run/dbus/system_bus_socket"
    )
