"""A Wayland compositor: seconds since the last input, by its protocol ext-idle-notify-v1.

KWin has it (from Plasma 5.27 on), and so have wlroots' compositors (sway from 1.8 on, labwc), COSMIC and
niri; GNOME has its own way. Six requests and five events are all that is spoken here: the few lines below
take no C library into the tray's process, where an error of it would be the tray's end.

A message is a head (the object, 16 bits of opcode, 16 bits of size with the head) and arguments, all in
words of four bytes in the machine's order. The numbers of objects are ours to choose, one after the other.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.worker.sensing.probes import LIMIT_S, UnknownError

QUIET_S = 5.0
"""The compositor tells when nobody has touched anything for so long; until then somebody is here."""

_HEAD = struct.Struct("=II")
_RECEIVE_BYTES = 1 << 16
"""No message is longer, so that no more than twice as much is ever kept."""

_DISPLAY = 1
"""The object that is there from the beginning."""
_SYNC, _GET_REGISTRY = 0, 1
_BIND = 0
_GET_IDLE_NOTIFICATION, _GET_INPUT_IDLE_NOTIFICATION = 1, 2
_ERROR = 0
_GLOBAL = 0
_IDLED, _RESUMED = 0, 1

Message = tuple[int, int, bytes]
"""An object, an opcode, and the arguments."""


class WaylandIdle:
    """A connection to one compositor, opened when it is first asked, and again after an error.

    It has no thread: what the compositor has told meanwhile is read when somebody asks, so that an absence
    counts from then on at the latest.
    """

    def __init__(self, path: str, clock: Clock = SYSTEM_CLOCK) -> None:
        """Args: path: of the compositor's socket."""
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._unread = b""
        self._last = _DISPLAY
        self._idled_at: dict[int, float | None] = {}
        """For each seat's notification: when it told that nobody is there; None: somebody is."""

    def idle_s(self) -> float:
        """Seconds since the last input at any seat; 0 until there was none for `QUIET_S`.

        Raises:
            UnknownError: there is no such compositor, or it does not tell.
        """
        with self._lock:
            try:
                if self._socket is None:
                    self._begin()
                else:
                    for message in self._news():
                        self._note(message)
            except OSError as error:
                self._end()
                raise UnknownError(f"the Wayland compositor does not answer: {error}") from error
            except UnknownError:
                self._end()
                raise
            return self._idle_s()

    def close(self) -> None:
        """End the connection. A later question opens it again."""
        with self._lock:
            self._end()

    def _idle_s(self) -> float:
        since = [0.0 if at is None else QUIET_S + self._clock.now() - at for at in self._idled_at.values()]
        return min(since)

    def _begin(self) -> None:
        self._unread, self._idled_at, self._last = b"", {}, _DISPLAY
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(LIMIT_S)
        self._socket.connect(self._path)
        registry = self._new()
        self._send(request(_DISPLAY, _GET_REGISTRY, registry))
        seats: list[int] = []
        notifier: tuple[int, int] | None = None
        for object_, opcode, body in self._until_done():
            if (object_, opcode) == (registry, _GLOBAL):
                number, interface, version = _global_of(body)
                if interface == "wl_seat":
                    seats.append(number)
                elif interface == "ext_idle_notifier_v1":
                    notifier = number, version
        if notifier is None or not seats:
            raise UnknownError("the Wayland compositor has no ext-idle-notify-v1, which tells of absences")
        self._subscribe(registry, seats, *notifier)

    def _subscribe(self, registry: int, seats: list[int], number: int, version: int) -> None:
        """Ask to be told of each seat. Input alone counts where that can be had (version 2): films, which
        keep a desktop awake, have a rule of their own.
        """
        version = min(version, 2)
        ask = _GET_INPUT_IDLE_NOTIFICATION if version >= 2 else _GET_IDLE_NOTIFICATION
        notifier = self._new()
        self._send(request(registry, _BIND, number, "ext_idle_notifier_v1", version, notifier))
        for of_seat in seats:
            seat = self._new()
            self._send(request(registry, _BIND, of_seat, "wl_seat", 1, seat))
            told = self._new()
            self._send(request(notifier, ask, told, int(QUIET_S * 1e3), seat))
            self._idled_at[told] = None
        for message in self._until_done():
            self._note(message)

    def _new(self) -> int:
        """The number of the next object."""
        self._last += 1
        return self._last

    def _send(self, message: bytes) -> None:
        assert self._socket is not None
        self._socket.sendall(message)

    def _note(self, message: Message) -> None:
        object_, opcode, _ = message
        if object_ in self._idled_at and opcode in (_IDLED, _RESUMED):
            self._idled_at[object_] = self._clock.now() if opcode == _IDLED else None

    def _until_done(self) -> Iterator[Message]:
        """All events until the compositor has done what was asked before."""
        done = self._new()
        self._send(request(_DISPLAY, _SYNC, done))
        while True:
            for message in self._complete():
                if message[0] == done:
                    return
                yield message
            self._receive()

    def _news(self) -> Iterator[Message]:
        """The events that have come meanwhile."""
        assert self._socket is not None
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._receive()
                yield from self._complete()

    def _receive(self) -> None:
        assert self._socket is not None
        received = self._socket.recv(_RECEIVE_BYTES)
        if not received:
            raise UnknownError("the Wayland compositor has ended the connection")
        self._unread += received

    def _complete(self) -> Iterator[Message]:
        """Take the complete messages out of what was received."""
        while len(self._unread) >= _HEAD.size:
            object_, second = _HEAD.unpack_from(self._unread)
            size, opcode = second >> 16, second & 0xFFFF
            if size < _HEAD.size or size % 4:
                raise UnknownError("the Wayland compositor sent what is no message")
            if len(self._unread) < size:
                return
            body, self._unread = self._unread[_HEAD.size : size], self._unread[size:]
            if (object_, opcode) == (_DISPLAY, _ERROR):
                raise UnknownError(f"the Wayland compositor refused: {_string(body, 8)[0]}")
            yield object_, opcode, body

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def request(object_: int, opcode: int, *arguments: int | str) -> bytes:
    """Return a message. Arguments are unsigned numbers, objects and strings."""
    body = b"".join(_argument(argument) for argument in arguments)
    return _HEAD.pack(object_, (_HEAD.size + len(body)) << 16 | opcode) + body


def _argument(argument: int | str) -> bytes:
    if isinstance(argument, int):
        return struct.pack("=I", argument)
    text = argument.encode() + b"\0"
    return struct.pack("=I", len(text)) + text + bytes(-len(text) % 4)


def _global_of(body: bytes) -> tuple[int, str, int]:
    """The number, interface and version of something that the compositor has."""
    try:
        (number,) = struct.unpack_from("=I", body)
        interface, end = _string(body, 4)
        (version,) = struct.unpack_from("=I", body, end)
    except struct.error:
        raise UnknownError("the Wayland compositor sent what is no message") from None
    return number, interface, version


def _string(body: bytes, at: int) -> tuple[str, int]:
    """A string and where it ends."""
    try:
        (size,) = struct.unpack_from("=I", body, at)
    except struct.error:
        raise UnknownError("the Wayland compositor sent what is no message") from None
    end = at + 4 + size
    return body[at + 4 : end].rstrip(b"\0").decode(errors="replace")[:256], end + -size % 4
